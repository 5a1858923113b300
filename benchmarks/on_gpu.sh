#!/usr/bin/env bash
# Everything that a GPU is to be asked, in one command: builds the kernels, then runs the parts of benchmarks/gpu/
# (docs/gpu.md says what each answers) and leaves benchmarks/results/<gpu>-<commit>.json, written after every part.
#   benchmarks/on_gpu.sh                    all parts, within 8 minutes; needs torch, pytest, pybind11, nvcc
#   benchmarks/on_gpu.sh --no-build         with the modules as they are
#   benchmarks/on_gpu.sh --only ops,step    some parts: several short calls on one card and commit make one file
#   benchmarks/on_gpu.sh --dry-run          on the CPU, in small: shows that every part runs, and keeps no results
# Other options go to python -m benchmarks.gpu (--minutes, --folder, --out, --commit). Without a GPU it is a dry run.
# Packages that are not installed may lie unpacked in $PACKAGES. A part whose packages are missing says so and is a line
# of the results. Exit code 1: a part failed or had no time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
started=$SECONDS
build=yes
if [ "${1:-}" = "--no-build" ]; then
  build=no
  shift
fi
if [ -n "${PACKAGES:-}" ]; then
  export PYTHONPATH="$PACKAGES${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ "$build" = yes ]; then
  "$python" -m pip install -q -e . --no-deps --no-build-isolation
fi
"$python" -m r1fast_kernels
minutes=$("$python" -c "print(8 - ($SECONDS - $started) / 60)") # what building took is part of the eight
"$python" -m benchmarks.gpu --minutes "$minutes" "$@"
