#!/usr/bin/env bash
# From nothing to an averaged model: environment, a small FSDP2 training run, the mean of its three checkpoints.
# Everything it makes lies in .venv and quickstart/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/env.sh
PATH=$PWD/.venv/bin:$PATH
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=  # two gloo processes, no GPU
torchrun() { python -m torch.distributed.run "$@"; }  # a torch from elsewhere has its command elsewhere
rm -rf quickstart

echo "== 1. Train a tiny Llama with FSDP2 on 2 processes"
torchrun --standalone --nproc-per-node 2 launch/train_tiny.py quickstart

echo "== 2. Average its three checkpoints into one Hugging Face model, with 2 processes"
torchrun --standalone --nproc-per-node 2 jobs/average.py \
    source.path=quickstart/run target.path=quickstart name=tiny model.config=quickstart/hf

echo "== 3. Load it with transformers"
python launch/generate.py quickstart/tiny-averaged "a check"

echo "== Done"
echo "fingerprint   $(python -c 'import ckpt_dist; print(ckpt_dist.fingerprint("quickstart/tiny-averaged"))')"
echo "checkpoints   quickstart/run/step-10, step-20, step-30"
echo "average       quickstart/tiny-averaged"
echo "its recipe    quickstart/tiny-averaged/average.yaml"
