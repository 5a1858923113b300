#!/usr/bin/env bash
# On a machine with a GPU: builds the kernels, runs the tests that need it, times every op, and leaves
# benchmarks/results/<gpu>-<commit>.json with a short table (python -m benchmarks.gpu_results prints it again).
#   benchmarks/on_gpu.sh              needs torch, pytest, pytest-benchmark, pybind11; nvcc for the CUDA kernels
#   benchmarks/on_gpu.sh --no-build   with the modules as they are
# Without a GPU it says so and does the same on the CPU: the script itself can be tried anywhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  device=cuda
  "$python" -c 'import torch; print("on_gpu:", torch.cuda.get_device_name(), "torch", torch.__version__)'
else
  device=cpu
  echo "on_gpu: no GPU here; what follows runs on the CPU, and no CUDA or Triton kernel is timed"
fi

if [ "${1:-}" != "--no-build" ]; then
  "$python" -m pip install -e . --no-deps --no-build-isolation
fi
"$python" -m r1fast_kernels | tee "$work/table.txt"
if [ "$device" = cuda ] && ! "$python" -c 'import r1fast_kernels._cuda'; then
  echo "on_gpu: the CUDA kernels are not built (is nvcc on PATH?); Triton's and torch's are tested and timed alone"
fi

# Failures are counted in the results; they stop neither the timing nor the writing of the file.
tests=passed
select=(-k "cuda and not compiled_for_the_cpu")
[ "$device" = cuda ] || select=(-k "cpu-cpu and tiny")
"$python" -m pytest -p no:cacheprovider tests/test_kernels.py tests/test_cuda.py "${select[@]}" \
  --junitxml="$work/tests.xml" || tests=failed
"$python" -m pytest -p no:cacheprovider --benchmark --benchmark-json="$work/times.json" --benchmark-max-time=0.3 \
  --benchmark-min-rounds=3 --benchmark-columns=median,rounds ${BENCHMARK_ARGUMENTS:-} || tests=failed
if [ -f benchmarks/kernels_vs_peers.py ]; then
  "$python" -m benchmarks.kernels_vs_peers 2>&1 | tee "$work/peers.txt" || echo "on_gpu: the peers did not run to the end"
fi

"$python" -m benchmarks.gpu_results "$work"
[ "$tests" = passed ]
