# shellcheck shell=bash
# One job in a slurm allocation; sourced by the batch scripts beside this file, which set HERE.
#
# Before the time limit slurm sends USR1 to the batch script, which asks the ranks to stop. They note what is done and
# end; the job is queued again and goes on there. CKPT_DIST_REQUEUE=0 leaves that to you.

# The allocation's memory, shared by the ranks of a node; half of it, because the page cache counts as well.
memory_of_a_rank() {
    local mib=${SLURM_MEM_PER_NODE:-0}
    [ "$mib" -gt 0 ] || mib=$((${SLURM_MEM_PER_CPU:-0} * ${SLURM_CPUS_ON_NODE:-1}))
    [ "$mib" -gt 0 ] || return 0
    mib=$((mib / 2 / NPROC))
    echo "engine.memory=$((mib < 128 ? 128 : mib > 8192 ? 8192 : mib))MiB"
}

run_job() {
    local hosts memory step stopped="" code=0 job=$SLURM_JOB_ID
    trap 'stopped=1' USR1 # first of all: without a trap the signal kills this script
    # The last task of an array has the id of the whole array: by that id all tasks would be stopped and queued again.
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    if [ -z "${NPROC:-}" ]; then
        local cpus=${SLURM_CPUS_ON_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-0}
        NPROC=$((gpus > 0 ? gpus : cpus > 8 ? cpus / 8 : 1))
    fi
    mapfile -t memory < <(memory_of_a_rank)
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=$(scontrol show node "${hosts%%$'\n'*}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    # below 32768, where the ports begin that the system itself hands out
    NNODES=${SLURM_JOB_NUM_NODES:-1} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export NPROC NNODES MASTER_ADDR MASTER_PORT
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over

    # Our memory comes before the words of the user: the last word of a key wins. SLURM_PROCID is that of the node's task.
    # shellcheck disable=SC2016
    srun --kill-on-bad-exit=1 --ntasks="$NNODES" --ntasks-per-node=1 \
        bash -c 'NODE_RANK=$SLURM_PROCID exec bash "$0" "$@"' \
        "$HERE/launch/torchrun.sh" "${@:1:1}" "${memory[@]}" "${@:2}" &
    step=$!
    [ -n "$stopped" ] || wait "$step" || code=$?
    [ -n "$stopped" ] || return "$code"

    trap '' USR1 # a second one would end the second wait
    scancel --signal=TERM "$job" || echo "The ranks could not be asked to stop." >&2 # without --batch: not this script
    code=0
    wait "$step" || code=$? # the code of a step that has ended is kept
    [ "$code" != 0 ] || return 0
    if [ "${CKPT_DIST_REQUEUE:-1}" = 1 ]; then
        echo "The time limit is near: job $job is queued again and will go on from here."
        scontrol requeue "$job" && return "$code"
    fi
    echo "Job $job was stopped before its time limit. Submit the same command again: it goes on from here." >&2
    return "$code"
}
