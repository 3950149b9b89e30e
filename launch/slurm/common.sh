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
    local head words=("$@") step code stopped=""
    if [ -z "${NPROC:-}" ]; then
        local cpus=${SLURM_CPUS_ON_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-0}
        NPROC=$((gpus > 0 ? gpus : cpus > 8 ? cpus / 8 : 1))
    fi
    case " $* " in *" engine.memory="*) ;; *) mapfile -t -O "${#words[@]}" words < <(memory_of_a_rank) ;; esac
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    NNODES=${SLURM_JOB_NUM_NODES:-1} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export NPROC NNODES MASTER_ADDR MASTER_PORT
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over

    trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # without --batch: the ranks, not this script
    srun --kill-on-bad-exit=1 --ntasks="$NNODES" --ntasks-per-node=1 \
        bash -c 'NODE_RANK=$SLURM_PROCID exec "$0" "$@"' "$HERE/launch/torchrun.sh" "${words[@]}" &
    step=$!
    while code=0; wait "$step" || code=$?; kill -0 "$step" 2>/dev/null; do :; done # a trap ends `wait` early
    if [ -n "$stopped" ] && [ "$code" != 0 ] && [ "${CKPT_DIST_REQUEUE:-1}" = 1 ]; then
        echo "The time limit is near: job $SLURM_JOB_ID is queued again and will go on from here."
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
