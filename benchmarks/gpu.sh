#!/usr/bin/env bash
# Everything that needs a GPU, in one command, from the root of a checkout: the kernels, the GPU tests, then the benchmarks. Results go to
# the folder in OUT (default: benchmarks/results).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-benchmarks/results}

python -c 'import torch; assert torch.cuda.is_available(), "torch finds no GPU"'
python -m mpformer_hf.ops build --cuda
python -m mpformer_hf.ops doctor --device cuda
python -m pytest -m gpu
python -m benchmarks.deformable_attention --device cuda --repeats 50 --output "$out/deformable_attention_gpu.json"
python -m benchmarks.model_speed --device cuda --image-size 1024 --repeats 20 --output "$out/model_speed_gpu.json"
python -m benchmarks.post_processing --device cuda --repeats 20 --output "$out/post_processing_gpu.json"
python -m benchmarks.piloting --recipe training/recipes/digit_scenes/panoptic/resnet50.yaml --seeds "${SEEDS:-1}" \
    --folder "${RUNS:-outputs/piloting_gpu}" --output "$out/piloting_gpu.json"
