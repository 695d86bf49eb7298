#!/usr/bin/env bash
# One job on a machine with an NVIDIA GPU and no network: build with CUDA, prove parity, time kernels and models, leave files.
#
#   bench/gpu/run.sh FOLDER [--quick] [--dry-run] [PART ...]
#
#   FOLDER     gets the results; a part that has its mark there, FOLDER/PART.done, is not run again
#   PART       build parity models layers bench train tune sanitize compile traincompile; without any, all of them in that
#              order, the most valuable first. bench: against eager. train: parity of training, then steps against eager.
#              tune: which way is fastest on this GPU, in FOLDER/tuning-*.json, which later parts use. compile and
#              traincompile: against torch.compile too, which tunes for minutes a model
#   --quick    the shortest form of each part: one type, one batch, five models
#   --dry-run  a rehearsal without a GPU: prints the commands, collects the tests, and runs the tools up to their launches
#   PYTHON     an interpreter whose torch has CUDA, with triton (default python3); nvcc is taken from CUDA_HOME or PATH
#
# Each part takes less than 8 minutes; the long ones stop by themselves and go on when called again.
# Exit status: 1 when a parity test has failed, 3 when the tests ran out of time, whatever else has been measured.
set -uo pipefail

usage() {
  sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[[ $# -ge 1 && $1 != -* ]] || usage
folder=$1
shift
dry='' quick='' parts=()
for word in "$@"; do
  case $word in
    --dry-run) dry=1 ;;
    --quick) quick=1 ;;
    build | parity | models | tune | layers | bench | train | sanitize | compile | traincompile) parts+=("$word") ;;
    *) echo "unknown option or part $word" >&2; exit 2 ;;
  esac
done
[[ ${#parts[@]} -gt 0 ]] || parts=(build parity models layers bench train tune sanitize compile traincompile)
mkdir -p "$folder"
out=$(cd "$folder" && pwd)
python=${PYTHON:-python3}
cd "$(dirname "$0")/../.."
export FB_CUDA=1 FB_REQUIRE_NATIVE=1 FB_GPU_PLANS=1 PYTHONPATH=$PWD FB_CACHE_DIR=$out

status=0 late=0
step() {  # runs a command, its output also into the part's log
  printf '+ %s\n' "$*"
  if [[ -n $dry ]]; then
    case "$*" in
      *compute-sanitizer*) ;;
      *'-m pytest'*) "$@" --collect-only --junitxml /dev/null 2>&1 | tail -1 ;;
      *bench.gpu.machine*) "$@" ;;
      *bench.gpu*) "$@" --dry-run 2>&1 | tail -1 ;;
    esac
    [[ ${PIPESTATUS[0]} == 0 ]] || { echo "rehearsal failed: $*"; exit 1; }
    return 0
  fi
  "$@" 2>&1 | tee -a "$out/$part.log"
  return "${PIPESTATUS[0]}"
}

few=(mobilenetv1_100 densenet121 legacy_seresnet50 resnext50_32x4d resnet50)
tests=(-q -p no:cacheprovider --durations 10 --deselect tests/test_cuda.py::test_job_script_is_rehearsed_to_its_end)

outcome() {  # of tests, by their exit status: 124 and 137 are out of time
  case $1 in
    0) ;;
    124 | 137) again=1 late=3 ;;
    *) failed=1 ;;
  esac
}

# Kernels compile for a second each, so several processes share the GPU. Out of time, what has run is in the report; called again, it
# starts over, with the kernels in Triton's cache.
suite() {  # seconds, tests
  local seconds=$1 workers=$(($(nproc) / 2))
  [[ -n $dry ]] || rm -f "$out/$part.xml"
  shift
  step timeout -s INT -k 30 "$seconds" "$python" -m pytest "$@" "${tests[@]}" -n "$((workers > 8 ? 8 : workers))" --junitxml "$out/$part.xml"
  outcome $?
  [[ -n $dry ]] || ! grep -qE '<(failure|error)' "$out/$part.xml" 2> /dev/null || failed=1
}

for part in "${parts[@]}"; do
  if [[ -e $out/$part.done ]]; then
    echo "$part: done before"
    continue
  fi
  start=$SECONDS
  failed=0 again=0
  case $part in
    build)
      step "$python" -c 'import torch, triton; assert torch.cuda.is_available(), "torch sees no CUDA device"' || exit 1
      for module in cmake ninja pybind11 pytest pytest_timeout xdist hypothesis; do
        package=${module//_/-}
        "$python" -c "import $module" 2> /dev/null || step "$python" -m pip install "${package/#xdist/pytest-xdist}" || exit 1
      done
      step "$python" setup.py --quiet build_ext --inplace || exit 1
      step "$python" -m bench.gpu.machine "$out/machine.json" || exit 1
      ;;
    parity)
      pick=()
      [[ -n $quick ]] && pick=(-k 'bfloat16 or not float')
      suite 440 tests/test_cuda.py tests/test_cuda_kernels.py tests/test_triton_kernels.py "${pick[@]}"
      ;;
    models)
      pick=()
      [[ -n $quick ]] && pick=(-k "$(printf '%s or ' "${few[@]}") stream or graph or weights")
      suite 440 tests/test_gpu_models.py "${pick[@]}"
      ;;
    train)
      pick=()
      [[ -n $quick ]] && pick=(-k 'bfloat16 or not float')
      if [[ ! -e $out/train-parity.done ]]; then
        suite 200 tests/test_triton_batch_norm.py tests/test_triton_conv_gradients.py tests/test_triton_squeeze_excite.py \
          tests/test_train_on_gpu.py "${pick[@]}"
        [[ -n $dry || $failed == 1 || $again == 1 ]] || touch "$out/train-parity.done"
      fi
      how=(--peers 'eager nchw' 'eager nhwc' --seconds 180 --out "$out/train.json")
      [[ -n $quick ]] && how=("${few[@]}" --dtype bfloat16 --rounds 3 "${how[@]}")
      step timeout 250 "$python" -m bench.gpu.train "${how[@]}" || again=1
      ;;
    traincompile)
      how=("${few[@]}" --seconds 300 --out "$out/train-compile.json")
      [[ -n $quick ]] && how+=(--dtype bfloat16 --rounds 3)
      step timeout 470 "$python" -m bench.gpu.train "${how[@]}" || true
      ;;
    sanitize)
      tool=$(command -v compute-sanitizer || true)
      [[ -n $dry ]] && tool=compute-sanitizer
      if [[ -z $tool ]]; then
        echo "sanitize: no compute-sanitizer on PATH" | tee "$out/sanitize.log"
      else
        small='test_integers_to_the_bit and bfloat16 and (MobileNet or grouped or gate)'
        for check in memcheck racecheck; do
          step timeout 110 "$tool" --tool "$check" --error-exitcode 9 "$python" -m pytest tests/test_triton_kernels.py "${tests[@]}" -k "$small"
          outcome $?
          step timeout 60 "$tool" --tool "$check" --error-exitcode 9 "$python" -m pytest tests/test_cuda_kernels.py "${tests[@]}" -k bfloat16-cuda
          outcome $?
          step timeout 60 "$tool" --tool "$check" --error-exitcode 9 "$python" -m pytest tests/test_triton_batch_norm.py \
            tests/test_triton_conv_gradients.py "${tests[@]}" -k 'test_integers_to_the_bit and bfloat16'
          outcome $?
        done
      fi
      ;;
    tune)
      how=(--batch 256 1 --seconds 380)
      [[ -n $quick ]] && how=("${few[@]}" --batch 256 --seconds 200)
      step timeout 470 "$python" -m bench.gpu.tune "${how[@]}" --out "$out/tune.json" || again=1
      ;;
    layers)
      names=(resnet50 resnext50_32x4d densenet121 mobilenetv1_100 legacy_xception legacy_senet154)
      [[ -n $quick ]] && names=(resnet50 mobilenetv1_100)
      step timeout 460 "$python" -m bench.gpu.layers "${names[@]}" --out "$out/layers.json" || again=1
      ;;
    bench | compile)
      how=(--seconds 400 --out "$out/$part.json")
      [[ -n $quick ]] && how+=(--batch 256 --rounds 5)
      [[ -n $quick || $part == compile ]] && how=("${few[@]}" "${how[@]}")
      [[ $part == bench ]] && how+=(--peers 'eager nchw' 'eager nhwc')
      step timeout 470 "$python" -m bench.gpu.models "${how[@]}" || true
      ;;
  esac
  if [[ $failed == 1 ]]; then
    status=1
  elif [[ -z $dry && $again == 0 && ! $part =~ ^(tune|bench|train|compile|traincompile)$ ]]; then
    touch "$out/$part.done"
  fi
  echo "$part: $((SECONDS - start)) s$([[ $failed == 1 ]] && echo ', FAILED')$([[ $again == 1 ]] && echo ', not finished')"
done
exit $((status > 0 ? status : late))
