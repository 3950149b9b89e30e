"""The command line: `ckpt-dist VERB key=value ...` and the files in `jobs/`.

`main` runs one verb in this process, which may be one of many ranks; `console` is the installed command.
Nothing heavy is imported before the command is known to be right.

Invariant: a person's mistake is one message on stderr, once per job, and an exit code from its class.
"""

from __future__ import annotations

import atexit
import importlib
import io
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from ckpt_dist import __version__, config, keys
from ckpt_dist.errors import STOP, CheckpointError, Stopped, UsageError, nearest, visible
from ckpt_dist.report import rank, show_result

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

FLAGS = {"-h": "--help", "-m": "--multirun", "-c": "--cfg", "-sc": "--shell-completion"}
KNOWN_FLAGS = ("--help", "--version", "--multirun", "--cfg", "--shell-completion")
LOOKING = {"inspect": "ckpt_dist.facts", "verify": "ckpt_dist.check"}  # the verbs that write nothing
STDOUT = "standard output"
HEAD_START_S = 2.0  # how long the other ranks leave the word to rank 0, which usually has the same to say


def console() -> NoReturn:
    """The installed command `ckpt-dist`."""
    leave(_console(sys.argv[1:]))


def _console(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        print(f"ckpt-dist {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
    return main(argv[0], argv[1:])


def leave(code: int) -> NoReturn:
    """End the process of a command. A rank does not take its interpreter apart: what torch still holds of a process group
    may let go of a tensor in a thread of its own meanwhile, and abort a job that is done."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # what nobody hears any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main(verb: str, argv: Sequence[str]) -> int:
    """Run one verb; the exit code."""
    _streams()
    return _guarded(lambda: _main(verb, list(argv)))


def _main(verb: str, argv: list[str]) -> int:
    if verb not in config.VERBS:
        known = ", ".join(config.VERBS)
        raise UsageError(f"There is no verb {verb!r}.{nearest(verb, config.VERBS)} Known: {known}.")
    flags, words = _flags(verb, argv)
    if "--help" in flags:
        return _say(help_text(verb))
    if "--version" in flags:
        return _say(f"ckpt-dist {__version__}")
    if "--shell-completion" in flags:
        return _complete(verb)
    sets = config.sweep(verb, words) if "--multirun" in flags else [words]
    if "--cfg" in flags:
        return _say("\n---\n".join(_yaml(verb, s) for s in sets))
    return _run(verb, argv, [config.load(verb, s) for s in sets])


def _run(verb: str, argv: list[str], configs: list[dict[str, Any]]) -> int:
    num_ranks = max(cfg["nproc"] for cfg in configs)
    if num_ranks > 1 and "WORLD_SIZE" not in os.environ:
        return _launch(verb, num_ranks, [word for word in argv if not word.startswith("nproc=")])
    if num_ranks > 1 and num_ranks != int(os.environ["WORLD_SIZE"]):
        raise UsageError(
            f"nproc={num_ranks}, but torchrun has started {os.environ['WORLD_SIZE']} ranks. Leave nproc out."
        )
    for number in () if verb in LOOKING else (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: STOP.set())
    module = importlib.import_module(LOOKING.get(verb, "ckpt_dist.run"))
    importlib.import_module("ckpt_dist.run").COMMAND.set()
    for cfg in configs:
        result = getattr(module, verb)(cfg)
        show_result(result or {}, cfg["json"])
    return 0


def _flags(verb: str, argv: list[str]) -> tuple[set[str], list[str]]:
    """Flags may stand anywhere; `--cfg` takes a word, of which only `job` makes sense here."""
    flags, words, rest = set(), [], iter(argv)
    for word in rest:
        flag = FLAGS.get(word, word)
        if not word.startswith("-"):
            words.append(word)
        elif flag.partition("=")[0] not in KNOWN_FLAGS:
            hint = nearest(word, KNOWN_FLAGS) or config.without_dashes(verb, word)
            raise UsageError(f"There is no flag {word!r}.{hint} Known: {', '.join(KNOWN_FLAGS)}.")
        elif flag.partition("=")[0] in ("--cfg", "--shell-completion"):
            value = flag.partition("=")[2] or next(rest, "")
            if flag.startswith("--cfg") and value != "job":
                raise UsageError(f"--cfg shows the configuration of a job: write --cfg job, not --cfg {value}.")
            flags.add(flag.partition("=")[0])
        else:
            flags.add(flag)
    return flags, words


# ---- what is shown


def _say(text: str) -> int:
    if rank() == 0:
        print(text)
    return 0


def _overview() -> str:
    verbs = [f"  {verb:9} {config.header(verb)[0]}" for verb in config.VERBS]
    usage = ["ckpt-dist VERB key=value ...    (ckpt-dist VERB --help lists the keys)", ""]
    return "\n".join(usage + verbs)


def help_text(verb: str) -> str:
    lines = config.header(verb)
    lines += ["", f"In a checkout: torchrun --nproc-per-node N jobs/{verb}.py key=value ...", "", "Keys:"]
    width = max(map(len, config.listing(verb)))
    for key, (default, comment) in config.listing(verb).items():
        choices = keys.kind(verb, key).choices
        value = "(needed)" if default == config.MISSING else "" if default == "null" else default
        lines.append(f"  {key:{width}} {value:10} {comment}" + (f" [{'|'.join(choices)}]" if len(choices) > 2 else ""))
    named = config.recipes(verb)
    lines += ["", "Recipes:", *(f"  {name:22} {text}" for name, text in named.items())] if named else []
    flags = "Flags: --cfg job (show the configuration), -m (key=a,b: one job after another for a and b), --version"
    return "\n".join([*lines, "", flags])


def _yaml(verb: str, words: Sequence[str]) -> str:
    import yaml

    text: str = yaml.safe_dump(config.preview(verb, words), sort_keys=False, allow_unicode=True)
    return text.rstrip()


def _complete(verb: str) -> int:
    """Shell completion is Hydra's own: eval "$(python jobs/convert.py --shell-completion install=bash)"."""
    import hydra

    hydra.main(config_path=str(config.folder("conf")), config_name=verb, version_base="1.3")(lambda cfg: None)()
    return 0


# ---- many processes


def _launch(verb: str, num_ranks: int, argv: list[str]) -> int:
    """torchrun inside this process, so that its exit code is the job's and its traceback is not shown."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)  # torchrun's own words
    signal.signal(signal.SIGUSR1, lambda number, frame: signal.raise_signal(signal.SIGTERM))  # which torchrun passes on
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    job = str(config.folder("jobs") / f"{verb}.py")
    words = ["--standalone", "--nproc-per-node", str(num_ranks), job, *argv]
    try:
        run(parse_args(words))  # type: ignore[no-untyped-call]
    except ChildFailedError as failed:
        return _exit_code(failed, "" if verb in LOOKING else " Run the same command again to go on from here.")
    except SignalException:
        return Stopped.exit_code  # the ranks were asked too, and have said so
    return 0


def _exit_code(failed: ChildFailedError, more: str) -> int:
    """The code of the rank that failed first; a rank that torchrun itself ended has nothing to say."""
    in_time = sorted(failed.failures.items(), key=lambda item: item[1].timestamp)
    rank_, first = next((item for item in in_time if item[1].exitcode != -signal.SIGTERM), in_time[0])
    if first.exitcode < 0:
        cause = " The machine's memory may have been full: lower engine.memory." if first.exitcode == -9 else ""
        who = f"rank {rank_} ({socket.gethostname()})"
        print(f"Error: {who} was ended by signal {-first.exitcode}.{cause}{more}", file=sys.stderr)
        return Stopped.exit_code
    return int(first.exitcode)


# ---- what goes wrong


class Stream(io.FileIO):
    """Standard output or error. What nobody can take of the latter (a pipe that was closed, a full disk, a terminal that
    is gone) ends no job."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 2:
                return len(data)
            error.filename = STDOUT
            raise


def _streams() -> None:
    """This process's own streams, also where it was started without: no file of a checkpoint may get one of their numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        if before is getattr(sys, f"__{name}__"):  # nobody has put another in its place
            encoding, errors = (before.encoding, before.errors) if before else ("utf-8", "strict")
            errors = "backslashreplace" if errors == "strict" else errors  # names that the terminal does not know
            buffer = io.BufferedWriter(Stream(number, "w", closefd=False))
            at_once = number == 2 or os.isatty(number) or getattr(before, "write_through", False)  # as python -u says
            new = io.TextIOWrapper(buffer, encoding, errors, line_buffering=at_once)
            setattr(sys, name, new)
            setattr(sys, f"__{name}__", new)


def _guarded(job: Callable[[], int]) -> int:
    try:
        code = job()
        sys.stdout.flush()
        return code
    except CheckpointError as error:
        if not getattr(error, "shared", False):
            _last_word(f"Error: {error}", debug=True, certain=isinstance(error, UsageError))
        return error.exit_code
    except KeyboardInterrupt:
        _last_word("Interrupted.", debug=True)
        return 130
    except BrokenPipeError:
        _mute()  # `| head` has closed stdout
        return 0
    except Exception as error:
        file = error.filename if isinstance(error, OSError) else None
        if file == STDOUT:
            _mute()
        if not getattr(error, "shared", False):
            text = "".join(traceback.format_exception(error))
            mine = f"{text}This is a mistake in ckpt_dist {__version__}, not in your command. Please report it."
            _last_word(mine if file is None else f"Error: {file!r:.300}: {error.strerror}.", debug=file is not None)  # type: ignore[attr-defined]
        return 1 if file in (None, STDOUT) else CheckpointError.exit_code


def _mute() -> None:
    """What could not be written to stdout must not be tried again when python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _last_word(message: str, debug: bool = False, certain: bool = False) -> None:
    """Print once per job. torchrun ends all ranks when one ends, so the others first wait for rank 0 to speak.

    `certain` says that rank 0 meets the same error, however long its imports take.
    """
    if rank() > 0:
        if certain and os.environ.get("GROUP_RANK", "0") != "0":
            return  # on another node nobody would end this rank, and rank 0 says the same
        time.sleep(HEAD_START_S * (30 if certain else 1))
        message = f"rank {rank()}: {message}"
    if debug and os.environ.get("CKPT_DIST_DEBUG") == "1":
        message = traceback.format_exc() + message
    print(visible(message), file=sys.stderr, flush=True)
