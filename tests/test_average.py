"""Contract: an average is the fp64 mean, rounded once: correctly for 16-bit results in all but near-ties of fp32 sums,
within the bound of fp32 summation for fp32 ones; the same bytes for any formats, shardings and rank counts of its
sources; and what must not be averaged is not. Not checked here: speed (benchmarks/).
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckpt_dist
from ckpt_dist import sources
from ckpt_dist.averages import fused, tensors
from ckpt_dist.averages.tensors import mean
from ckpt_dist.cli import main
from ckpt_dist.errors import CheckpointError, UsageError
from tests.conftest import torchrun

Real = Callable[[str], Path]
SHAPE = (300, 701)  # nothing round, less than a tile


def trajectory(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Checkpoints as training makes them: close to each other, values of many magnitudes."""
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(SHAPE, generator=generator) * torch.logspace(-4, 1, SHAPE[1])
    return [(base + 0.02 * base.abs() * torch.randn(SHAPE, generator=generator)).to(dtype) for _ in range(count)]


def write(folder: Path, values: list[torch.Tensor]) -> Path:
    """One checkpoint a step, in turn as DCP, as safetensors and as one .pt file."""
    for k, value in enumerate(values):
        state, step = (
            {"w": value, "norm.weight": value[0].clone(), "count": torch.tensor([5, 1000001])},
            folder / f"step-{k + 1}",
        )
        step.mkdir(parents=True)
        if k % 3 == 0:
            dcp.save({"model": state}, checkpoint_id=step, no_dist=True)
        elif k % 3 == 1:
            save_file(state, step / "model.safetensors")
        else:
            torch.save({"model": state}, step / "model.pt")
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [2, 3, 7, 16, 64])
def test_16_bit_means_are_correctly_rounded_but_for_near_ties(tmp_path: Path, dtype: torch.dtype, count: int) -> None:
    values = trajectory(count, dtype)
    ckpt_dist.average(write(tmp_path / "run", values), tmp_path / "mean")
    got = load_file(tmp_path / "mean/model.safetensors")
    exact = torch.stack([v.double() for v in values]).mean(0)
    wanted = exact.to(dtype)
    wrong = got["w"] != wanted
    ulp = (got["w"].double() - wanted.double()).abs()
    slack = (
        count * 2.0**-24 * torch.stack([v.double().abs() for v in values]).sum(0) / count
    )  # how far an fp32 sum may be off
    off_tie = ((got["w"].double() - exact).abs() - (wanted.double() - exact).abs())[wrong]
    print(f"{dtype} N={count}: {int(wrong.sum())} of {wrong.numel()} elements rounded the other way, all at near-ties")
    assert (off_tie <= 2 * slack[wrong]).all()  # both neighbours are equally near, to within the error of the sum
    assert int(wrong.sum()) <= wrong.numel() * count * 2.0**-14 and ulp.isfinite().all()
    assert got["count"].tolist() == [5, 1000001] and got["count"].dtype == torch.int64


@pytest.mark.parametrize("count", [2, 5, 64])
def test_fp32_means_are_within_the_bound_and_constants_stay_exact(tmp_path: Path, count: int) -> None:
    values = trajectory(count, torch.float32)
    for v in values:
        v[3] = values[0][3]
    ckpt_dist.average(write(tmp_path / "run", values), tmp_path / "mean")
    got = load_file(tmp_path / "mean/model.safetensors")["w"]
    exact = torch.stack([v.double() for v in values]).mean(0)
    bound = (count + 1) * 2.0**-24 * torch.stack([v.double().abs() for v in values]).mean(0)
    assert ((got.double() - exact).abs() <= bound).all()
    assert torch.equal(got[3], values[0][3])


@pytest.fixture
def llvm() -> Any:
    """llvmlite, where it can do its work: a CPU that it should know and does not is a failure, and not skipped."""
    binding = pytest.importorskip("llvmlite.binding", reason="llvmlite is not installed")
    if not fused._capable(platform.machine(), binding.get_host_cpu_features()):
        pytest.skip(f"this {platform.machine()} does not multiply and add with one rounding")
    assert all(fused.one_pass(d, w, divide) for d in fused.LLVM for w in fused.LLVM for divide in (False, True))
    return binding


@pytest.fixture(params=["llvmlite", "torch"])
def summed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What sums are computed by: machine code in one pass, or torch as without the extra `fast`."""
    if request.param == "torch":
        monkeypatch.setattr(tensors, "one_pass", lambda *key: None)
    else:
        request.getfixturevalue("llvm")
    return str(request.param)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("count", [2, 3, 4, 6, 8])
def test_a_mean_is_the_sum_in_order_divided_and_rounded_once(summed_by: str, dtype: str, count: int) -> None:
    """Bit for bit as numpy has it, also where values are tiny, huge, infinite or -0; a power of two is not divided by."""
    kind = getattr(torch, dtype)
    words = np.random.default_rng(count).integers(0, 1 << 16, (count, 1 << 16), dtype=np.uint16)
    words[:, :4] = [0, 0x8000, 1, 0x8001]
    wide = [torch.from_numpy(w).view(kind).float().numpy() for w in words]
    with np.errstate(all="ignore"):
        total = wide[0].copy()
        for value in wide[1:]:
            total += value
        total /= np.float32(count)
        most = np.isinf(total) & np.isfinite(wide).all(0)  # a mean is no larger than what it is of: these have bits too
        fits = sum(w[most].astype(np.float64) / count for w in wide)
    wanted = torch.from_numpy(total).to(kind)
    wanted[most] = torch.from_numpy(np.asarray(fits)).to(kind)
    assert most.any() == (dtype == "bfloat16")
    found = torch.from_numpy(mean(iter(words), [dtype] * count, [1 / count] * count, dtype).copy()).view(kind)
    numbers = ~wanted.isnan()
    assert torch.equal(found.isnan(), ~numbers) and numbers.sum() > 1 << 14
    assert torch.equal(found[numbers].view(torch.int16), wanted[numbers].view(torch.int16))


@pytest.mark.parametrize("coefficients", [[1 / 3] * 3, [0.25] * 4, [2.0, -1.0], [0.2, 0.3, 0.5]])
def test_a_mask_stays_what_it_is(summed_by: str, coefficients: list[float]) -> None:
    """The least number of bfloat16 is that of fp32, but for a few bits: its sums do not fit."""
    least = torch.full((100,), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16)
    mask = least.view(torch.int16).numpy().view(np.uint16)
    found = mean([mask] * len(coefficients), ["bfloat16"] * len(coefficients), coefficients, "bfloat16")
    assert np.array_equal(found, mask)


WORDS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(sorted(WORDS)),
    want=st.sampled_from(sorted(WORDS)),
    count=st.integers(1, 13),
    numel=st.sampled_from([1, 63, 64, 65, 200, 1027]),
    uniform=st.booleans(),
    kind=st.sampled_from(["any bits", "any size", "alike"]),
    seed=st.integers(0, 1 << 30),
)
def test_one_pass_has_the_bits_of_torch(
    llvm: Any, dtype: str, want: str, count: int, numel: int, uniform: bool, kind: str, seed: int
) -> None:
    """Also where sources differ by magnitudes, values are equal in all of them, or the length is no multiple of anything."""
    random, word = np.random.default_rng(seed), WORDS[dtype]
    if kind == "any bits":
        values = [random.integers(0, 1 << 8 * word().itemsize, numel, np.uint64).astype(word) for _ in range(count)]
    else:
        size = [10.0 ** random.integers(-40, 38) if kind == "any size" else 1.0 for _ in range(count)]
        made = [torch.from_numpy(random.standard_normal(numel) * s).to(getattr(torch, dtype)) for s in size]
        values = [m.view(torch.uint8).numpy().view(word) for m in made]
        for value in values[1:] if kind == "alike" else []:
            value[::3] = values[0][::3]
    coefficients = [1 / count] * count if uniform else random.dirichlet(np.ones(count)).tolist()

    def computed() -> torch.Tensor:
        return torch.from_numpy(mean(values, [dtype] * count, coefficients, want).copy()).view(getattr(torch, want))

    one = computed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "one_pass", lambda *key: None)
        other = computed()
    number = ~(one.isnan() & other.isnan())
    assert torch.equal(one[number].view(torch.uint8), other[number].view(torch.uint8))


@pytest.mark.parametrize("lack", ["package", "version", "instruction", "machine", "refused"])
def test_without_what_one_pass_needs_torch_computes_the_same(
    llvm: Any, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    values = [v.view(torch.int16).numpy().view(np.uint16).ravel() for v in trajectory(5, torch.bfloat16)]
    wanted = mean(values, ["bfloat16"] * 5, [0.2] * 5, "bfloat16").copy()
    monkeypatch.setattr(fused, "MADE", {})

    def refuse(*given: object) -> None:
        raise RuntimeError("LLVM IR parsing error")

    if lack == "package":
        monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    elif lack == "version":
        monkeypatch.setattr(llvm, "llvm_version_info", (15, 0, 7))
    elif lack == "refused":
        monkeypatch.setattr(llvm, "parse_assembly", refuse)
    else:
        monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: {"f16c": True})
        monkeypatch.setattr(fused.platform, "machine", lambda: "x86_64" if lack == "instruction" else "riscv64")
    assert fused.one_pass("bfloat16", "bfloat16", True) is None
    monkeypatch.setattr(tensors, "SUMMED", set())
    assert (mean(values, ["bfloat16"] * 5, [0.2] * 5, "bfloat16") == wanted).all()
    assert {"bfloat16 is summed one source after the other, by torch"} == tensors.SUMMED


ONCE, EACH = "{} is summed in one pass, by llvmlite", "{} is summed one source after the other, by torch"


@pytest.mark.parametrize(
    ("dtypes", "more", "said"),
    [
        (["float32"], {}, [ONCE.format("float32")]),
        (["bfloat16"], {"target.dtype": "fp32"}, [ONCE.format("float32")]),
        (["bfloat16", "float64"], {}, [ONCE.format("bfloat16"), EACH.format("float64")]),
        (["float32"], {"target.dtype": "fp64"}, [EACH.format("float64")]),
        (["int64"], {}, []),
    ],
)
@pytest.mark.parametrize("count", [2, 3])
def test_a_job_says_how_it_sums(
    llvm: Any, tmp_path: Path, dtypes: list[str], more: dict[str, str], said: list[str], count: int
) -> None:
    paths = [tmp_path / f"{k}.safetensors" for k in range(count)]
    for path in paths:
        save_file({d: torch.ones(3, dtype=getattr(torch, d)) for d in dtypes}, path)
    keys = {"format": "torch", "model": "identity", "quiet": True, **more}
    notes = ckpt_dist.average(paths, tmp_path / "mean", **keys)["notes"]
    assert [n for n in notes if "summed" in n] == said and "computed on cpu" in notes


@pytest.mark.parametrize("given", [[8, 8], [8, 8, 4], [8, 8, 8, 8, 9]])
def test_tiles_that_do_not_fit_are_refused_before_an_address_is_read(summed_by: str, given: list[int]) -> None:
    values = [np.zeros(numel, np.uint16) for numel in given]
    count = max(3, len(given))
    with pytest.raises((ValueError, RuntimeError)):
        mean(values, ["bfloat16"] * count, [1 / count] * count, "bfloat16")


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (2, 3, 0), (3, 0, 5), (0,)])
def test_tensors_without_elements(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """They were filled with what a thread's memory held, which differed from source to source."""
    state = {"a": torch.randn(300), "none": torch.empty(shape), "z": torch.randn(60000, dtype=torch.float64)}
    for k in range(2):
        save_file(state, tmp_path / f"{k}.safetensors")
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    sources = [tmp_path / "0.safetensors", tmp_path / "dcp", tmp_path / "1.safetensors"]
    assert len({ckpt_dist.fingerprint(s) for s in sources}) == 1
    ckpt_dist.average(sources, tmp_path / "mean")
    assert ckpt_dist.verify(sources[0], tmp_path / "mean")["equal"]
    ckpt_dist.convert(sources[0], tmp_path / "out", format="dcp", **{"engine.verify": True, "engine.workers": 1})
    assert load_file(tmp_path / "mean/model.safetensors")["none"].shape == shape


def test_what_sums_cannot_hold_is_refused(tmp_path: Path) -> None:
    run = write(tmp_path / "run", trajectory(3, torch.bfloat16))
    with pytest.raises(UsageError, match="1e\\+40 does not fit into float32"):
        ckpt_dist.average(run, tmp_path / "mean", weights=[1e40, -1e40, 1])
    assert not (tmp_path / "mean").exists()
    eight = [np.zeros(8, np.uint8)] * 2
    with pytest.raises(CheckpointError, match="8-bit floats"):
        mean(eight, ["float8_e4m3fn"] * 2, [0.5, 0.5], "bfloat16")


@pytest.mark.parametrize("verb", ["convert", "average"])
def test_what_does_not_fit_into_fp16_and_rules_that_fit_nothing_are_said(tmp_path: Path, verb: str) -> None:
    for name, most in (("a", 65504.0), ("b", 65536.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([1.0, most]), "v": torch.ones(2)}, tmp_path / name / "model.safetensors")
    for name in "ab":
        given = [tmp_path / name] * 2 if verb == "average" else tmp_path / name
        done = getattr(ckpt_dist, verb)(given, tmp_path / f"{name}16", dtype={"default": "float16", "norm*": "float32"})
        assert any("no weight is called 'norm*'" in w for w in done["warnings"])
        assert any("w: values beyond 65504 do not fit" in w for w in done["warnings"]) == (name == "b")
        assert load_file(tmp_path / f"{name}16/model.safetensors")["w"].isinf().any() == (name == "b")


def test_bf16_sources_can_become_an_fp32_mean_and_weights_are_used(tmp_path: Path) -> None:
    values = trajectory(3, torch.bfloat16)
    run = write(tmp_path / "run", values)
    ckpt_dist.average(run, tmp_path / "mean", dtype="float32", steps=[3, 1], weights=[0.25, 0.75])
    got = load_file(tmp_path / "mean/model.safetensors")["w"]
    exact = 0.25 * values[2].double() + 0.75 * values[0].double()
    assert got.dtype == torch.float32
    assert ((got.double() - exact).abs() <= 4 * 2.0**-24 * exact.abs().clamp(min=values[0].double().abs())).all()
    done = ckpt_dist.average(run, tmp_path / "double", weights=[1, 1, 2])
    assert any("sum to 4" in w for w in done["warnings"])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_any_rank_count_writes_the_same_bytes(real: Real, tmp_path: Path, num_ranks: int) -> None:
    ckpt_dist.average(real("steps"), tmp_path / "api")
    done = torchrun(
        num_ranks, "jobs/average.py", f"source.path={real('steps')}", f"target.path={tmp_path / 'out'}", "json=true"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "api/model.safetensors").read_bytes()
    report = json.loads(done.stdout)
    assert len(report["peak_memory"]) == num_ranks and len(report["source_fingerprints"]) == 3


def test_dialects_and_shardings_may_differ_and_the_recipe_is_recorded(real: Real, tmp_path: Path) -> None:
    start, config = real("bf16"), {"model.config": str(real("bf16") / "hf")}
    ckpt_dist.convert(start / "hf", tmp_path / "titan", format="dcp", dialect="torchtitan", **config)
    sources = [start / "dcp", start / "ranks", start / "hf", tmp_path / "titan"]
    done = ckpt_dist.average(sources, tmp_path / "out", name="four", **config)
    out = tmp_path / "out/four-averaged"
    assert done["target"] == str(out)
    assert (out / "model.safetensors").read_bytes() == (start / "hf/model.safetensors").read_bytes()
    record = yaml.safe_load((out / "average.yaml").read_text())
    prints = {s["fingerprint"] for s in record["sources"]} | {record["fingerprint"], ckpt_dist.fingerprint(out)}
    assert len(prints) == 1 and [s["weight"] for s in record["sources"]] == [0.25] * 4


@pytest.mark.parametrize("titan", [False, True])
def test_dtypes_may_differ_where_one_is_asked_for(real: Real, tmp_path: Path, titan: bool) -> None:
    """In the names of one dialect and in those of two: never is one checkpoint's dtype that of the mean in silence."""
    start, config = real("bf16") / "hf", {"model.config": str(real("bf16") / "hf")}
    wide = {n: v.float() * 1.01 for n, v in load_file(start / "model.safetensors").items()}
    (tmp_path / "wide").mkdir()
    save_file(wide, tmp_path / "wide/model.safetensors")
    other = tmp_path / ("titan" if titan else "wide")
    if titan:
        ckpt_dist.convert(tmp_path / "wide", other, format="dcp", dialect="torchtitan", **config)
    for rules in ("keep", {"*norm*": "float32"}):
        with pytest.raises(
            CheckpointError, match=r"different dtypes:\n  [\w.]+: bfloat16\[.*\] in hf, float32\[.*\] in"
        ):
            ckpt_dist.average([start, other], tmp_path / "out", dtype=rules, **config)
    ckpt_dist.average([start, other], tmp_path / "out", dtype="float32", **config)
    mean, low = load_file(tmp_path / "out/model.safetensors"), load_file(start / "model.safetensors")
    for name, value in mean.items():
        assert torch.equal(value, (low[name].float() + wide[name]) / 2), name
    record = yaml.safe_load((tmp_path / "out/average.yaml").read_text())
    prints = [ckpt_dist.fingerprint(s, **config) for s in (start, other, tmp_path / "out")]
    assert prints == [*(s["fingerprint"] for s in record["sources"]), record["fingerprint"]]


def test_steps_are_chosen_by_number_and_averages_are_not_taken_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "run", trajectory(12, torch.bfloat16))
    (run / "step-last").symlink_to(run / "step-12")
    ckpt_dist.average(run, run, name="early", steps=[1, 2, 3])
    assert main("average", [f"source.path={run}", f"target.path={tmp_path / 'late'}", "last=3"]) == 0
    table = capsys.readouterr().err
    assert all(f"step {s}: weight 0.333333" in table for s in (10, 11, 12)) and "step 9" not in table
    assert main("average", [f"source.path={run}", f"target.path={tmp_path / 'all'}"]) == 0
    table = capsys.readouterr().err
    assert table.count(": weight 0.0833333") == 12
    assert main("average", [f"source.path={run}", f"target.path={tmp_path / 'comma'}", "steps=2,11"]) == 0
    with pytest.raises(CheckpointError, match="no step 13"):
        ckpt_dist.average(run, tmp_path / "x", steps=[1, 13])
    with pytest.raises(CheckpointError, match="only 12 steps"):
        ckpt_dist.average(run, tmp_path / "x", last=13)


def test_what_else_a_run_numbers_is_no_step(tmp_path: Path) -> None:
    """Lightning's logs, results of an evaluation: as their words are no step's, they count where nothing else does."""
    run = write(tmp_path / "run", trajectory(2, torch.bfloat16))
    for name in ("version_0", "eval_2", "logs_1"):
        (run / name).mkdir()
    (run / "best_2").symlink_to(run / "step-2")
    assert sorted(sources.steps(run)) == [1, 2]
    ckpt_dist.average(run, tmp_path / "mean")
    for step in (1, 2):
        (run / f"step-{step}").rename(run / f"llama_tiny-{step}")
    (run / "best_2").unlink()
    with pytest.raises(CheckpointError, match="step 2 twice: eval_2 and llama_tiny-2"):
        ckpt_dist.average(run, tmp_path / "again")
    for name in ("version_0", "eval_2", "logs_1"):
        (run / name).rmdir()
    assert sorted(sources.steps(run)) == [1, 2]


def test_what_must_not_be_averaged(tmp_path: Path) -> None:
    values = trajectory(3, torch.bfloat16)
    for k, v in enumerate(values):
        (tmp_path / f"run/step-{k}").mkdir(parents=True)
        bias = torch.tensor([float(k)])
        save_file({"w": v, "mlp.gate.e_score_correction_bias": bias}, tmp_path / f"run/step-{k}/model.safetensors")
    ckpt_dist.average(tmp_path / "run", tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")["mlp.gate.e_score_correction_bias"].item() == 2.0
    save_file(
        {"w": values[0], "mlp.gate.e_score_correction_bias": torch.tensor([1])},
        tmp_path / "run/step-0/model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"e_score_correction_bias: int64\[1\] in step-0, float32\[1\] in step-1"):
        ckpt_dist.average(tmp_path / "run", tmp_path / "again")
    for k in range(3):
        save_file({"w": values[k], "count": torch.tensor([k])}, tmp_path / f"run/step-{k}/model.safetensors")
    with pytest.raises(CheckpointError, match="count: integer values differ"):
        ckpt_dist.average(tmp_path / "run", tmp_path / "ints")
    for k in range(3):
        save_file({"w": values[k], "f": torch.tensor([k * 1j])}, tmp_path / f"run/step-{k}/model.safetensors")
    with pytest.raises(CheckpointError, match="f: complex values differ"):
        ckpt_dist.average(tmp_path / "run", tmp_path / "ints")
    with pytest.raises(UsageError, match="no key 'keep'"):  # optimizer moments are never averaged
        ckpt_dist.average(tmp_path / "run", tmp_path / "ints", keep=["weights", "optimizer"])
    assert not (tmp_path / "ints").exists() and not list(tmp_path.glob(".*ckpt_dist*"))


def test_what_an_average_is_named_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run", trajectory(2, torch.float32))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "run/step-1")
    for k, path in enumerate(("..", "~/run", str(tmp_path / "run") + "/")):
        ckpt_dist.average(path, quiet=True)
        (tmp_path / "run-averaged").rename(tmp_path / f"{k}")
    ckpt_dist.average("../../run", "~/here", quiet=True)
    assert (tmp_path / "here/average.yaml").is_file()
    for name in ("a/b", "../a", "/a"):
        with pytest.raises(UsageError, match="names no folder of its own"):
            ckpt_dist.average(tmp_path / "run", name=name, quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "here", "run"]


def test_many_tiles_by_several_threads(tmp_path: Path) -> None:
    """What a thread keeps for its sums and casts is used again by its next tile; no tile may see another's."""
    generator = torch.Generator().manual_seed(1)
    states = [
        {f"w{n}": torch.randn(3, 700_001 + n, generator=generator).bfloat16() for n in range(3)} for _ in range(2)
    ]
    for k, state in enumerate(states):
        (tmp_path / f"step-{k}").mkdir()
        save_file(state, tmp_path / f"step-{k}/model.safetensors")
    paths = [tmp_path / "step-0", tmp_path / "step-1"]
    ckpt_dist.average(paths, tmp_path / "mean", quiet=True, **{"engine.workers": 4})
    mean = load_file(tmp_path / "mean/model.safetensors")
    for name, value in mean.items():
        assert torch.equal(value, ((states[0][name].float() + states[1][name].float()) / 2).bfloat16()), name
    for word, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        ckpt_dist.convert(paths[0], tmp_path / word, quiet=True, **{"engine.workers": 4, "target.dtype": word})
        cast = load_file(tmp_path / word / "model.safetensors")
        assert all(torch.equal(cast[name], value.to(dtype)) for name, value in states[0].items())


def test_an_adapter_stays_one_and_its_factors_are_said_to_be_averaged(tmp_path: Path) -> None:
    """Under the names that peft looks for; a model beside which an adapter lies does not become one."""
    for k in range(2):
        folder = tmp_path / f"run/checkpoint-{k}"
        folder.mkdir(parents=True)
        names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{f}.weight" for f in "AB"]
        save_file({n: torch.full((2, 2), float(k)) for n in names}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (said,) = ckpt_dist.average(tmp_path / "run", tmp_path / "mean")["warnings"]
    assert "lora_A.weight and the like are factors of an adapter" in said
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {p.name for p in (tmp_path / "mean").iterdir()}
    assert not (tmp_path / "mean/model.safetensors").exists()
    for k in range(2):
        save_file({"w": torch.ones(2)}, tmp_path / f"run/checkpoint-{k}/model.safetensors")
    done = ckpt_dist.average(tmp_path / "run", tmp_path / "models")
    assert "the adapter beside the model (adapter_config.json) is left out" in done["warnings"][0]
    assert not (tmp_path / "models/adapter_config.json").exists()


PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
import ckpt_dist

torch.set_num_threads(3)
run, out = Path(sys.argv[1]), Path(sys.argv[2])
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda k: ckpt_dist.average(run, out / str(k)), range(4)))
ckpt_dist.average(run, out / "mean")
ckpt_dist.verify(out / "mean", run / "step-1", rtol=9, atol=9)
with ThreadPoolExecutor(1) as pool:
    print(torch.get_num_threads(), pool.submit(torch.get_num_threads).result())
"""


def test_threads_of_a_program_may_run_jobs_and_torch_keeps_its_own(tmp_path: Path) -> None:
    """Several from the first moment on; torch's are counted afterwards here and in a thread that begins then."""
    run = write(tmp_path / "run", trajectory(2, torch.bfloat16))
    words = [sys.executable, "-c", PROGRAM, str(run), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["3", "3"], done.stderr[-3000:]
