#!/usr/bin/env bash
# One job on a machine with an NVIDIA GPU: build with CUDA, test on the GPU, time the kernels, leave JSON behind.
#
#   bench/gpu/run.sh FOLDER [--dry-run]
#
#   FOLDER     gets machine.json, tests.xml and kernels.json
#   --dry-run  prints the commands instead of running them
#   PYTHON     an interpreter whose torch has CUDA (default python3); nvcc is taken from CUDA_HOME or PATH
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
dry=${2:-}
if [[ -n $dry && $dry != --dry-run ]]; then
  echo "unknown option $dry" >&2
  exit 2
fi
python=${PYTHON:-python3}
cd "$(dirname "$0")/../.."

step() {
  printf '+ %s\n' "$*"
  [[ $dry == --dry-run ]] || "$@"
}

export FB_CUDA=1 FB_REQUIRE_NATIVE=1

step "$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"'
for module in cmake ninja pybind11 pytest pytest_benchmark pytest_timeout hypothesis; do
  "$python" -c "import $module" 2> /dev/null || step "$python" -m pip install "${module//_/-}"
done
step "$python" setup.py --quiet build_ext --inplace
step "$python" -m bench.gpu.machine "$out/machine.json"
step "$python" -m pytest tests/test_cuda.py --junitxml "$out/tests.xml"
step "$python" -m pytest bench/gpu --benchmark-only --benchmark-columns=median,iqr,rounds \
  --benchmark-json "$out/kernels.json"
