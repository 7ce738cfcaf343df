#!/usr/bin/env bash
# What only GPUs can show, in under ten minutes on any number of them: speed-up and memory of several processes, of a
# batch in parts, of compiled blocks and of a frozen encoder held in parts; and that a run on all of them learns what
# one learns.
#
#     benchmarks/gpu.sh                                   # a ViT of random weights: 38 M, 257 tokens
#     benchmarks/gpu.sh 'clip(path="openai/clip-vit-base-patch16")'
set -euo pipefail
cd "$(dirname "$0")/.."
backbone=${1:-'tiny(dim=512, depth=12, size=64)'}
gpus=$(nvidia-smi --list-gpus | wc -l)
scaling() { timeout 120 python benchmarks/scaling.py --device cuda --processes "$gpus" --backbone "$backbone" "$@"; }

echo "## $gpus GPUs, $backbone"
scaling --batch-size 128 --images 2560 --epochs 1
echo "## a batch in 4 parts"
scaling --batch-size 128 --images 2560 --epochs 1 --accumulate 4 --methods 'lora(rank=10)'
echo "## compiled blocks"
timeout 120 python benchmarks/compiled.py --device cuda --backbone "$backbone" --batch-size 128 --precision bf16 --methods 'lora(rank=10)'
if [ "$gpus" -gt 1 ]; then
  echo "## blocks held in parts"
  scaling --batch-size 128 --images 2560 --epochs 1 --shard blocks --methods 'lora(rank=10)'
  echo "## accuracies of one GPU and of $gpus"
  out=$(mktemp -d)
  for processes in 1 "$gpus"; do
    python -m perdure.cli run --stream 'synthetic(tasks=3, per_class=40)' --backbone 'tiny()' --method 'inflora(rank=2)' \
      --device cuda --precision fp32 --processes "$processes" --out "$out/$processes" --json | tail -n 1 |
      python -c 'import json, sys; print(json.loads(sys.stdin.read())["summary"]["matrix"])'
  done
fi
