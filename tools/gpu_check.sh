#!/usr/bin/env bash
# Check and measure on a GPU, in six stages of at most ten minutes each:
#     tools/gpu_check.sh [--dry-run] STAGE [OUT]
#
# 1 correctness  2 the slow tests, and memory accesses  3 inference  4 training  5 main.py  6 single operators
#
# OUT (output/gpu) gets stageN.txt and the records of the benchmarks as JSON. --dry-run prints the commands only. The
# exit code is 1 if a command failed. PYTHON: the interpreter (python3). Nothing is downloaded.

set -u -o pipefail
cd "$(dirname "$0")/.." || exit 2

dry=
if [ "${1-}" = --dry-run ]; then dry=1; shift; fi
stage=${1-}
out=${2:-output/gpu}
python=${PYTHON:-python3}
case $stage in
  [1-6]) ;;
  *) echo "gpu_check.sh: error: no such stage (${stage:-none}): pass a number from 1 to 6" >&2; exit 2 ;;
esac
[ -n "$dry" ] || mkdir -p "$out" || exit 2
log=$out/stage$stage.txt
failed=0

# run SECONDS COMMAND...: what it prints is shown, and added to the stage's text
run() {
  local limit=$1; shift
  printf 'timeout %s' "$limit"; printf ' %q' "$@"; echo
  [ -z "$dry" ] || return 0
  timeout "$limit" "$@" 2>&1 | tee -a "$log" || failed=1
}

# record SECONDS NAME [VARIABLE=VALUE ...] OPTIONS...: a record of tools.benchmark, OUT/NAME.json, and in the folder
# OUT/NAME what was measured before a timeout
record() {
  local limit=$1 name=$2 variables=(); shift 2
  while [[ ${1-} == *=* ]]; do variables+=("$1"); shift; done
  set -- env "${variables[@]}" "$python" -m tools.benchmark --device cuda --models alt_gvt_small --dtype bfloat16 --batch-size 256 --json --output "$out/$name" "$@"
  printf 'timeout %s' "$limit"; printf ' %q' "$@"; echo
  [ -z "$dry" ] || return 0
  timeout "$limit" "$@" 2> >(tee -a "$log" >&2) >"$out/$name.json" || failed=1
}

# optional PROGRAM SECONDS COMMAND...: only where the program is installed
optional() {
  local program=$1; shift
  if [ -n "$dry" ] || command -v "$program" >/dev/null; then run "$@"; else echo "$program: not installed" | tee -a "$log"; fi
}

tests=("$python" -m pytest -q -p no:cacheprovider)
data=/tmp/twins
if [ -z "$dry" ]; then data=$(mktemp -d) && trap 'rm -rf "$data"' EXIT || exit 2; fi
model=(--model alt_gvt_demo --data-path "$data/digits" --input-size 32 --warmup-epochs 0 --lr 4e-3 --hflip 0 --mixup 0 --cutmix 0 --reprob 0)
compiled=(--aa "" --epochs 2 --amp-dtype bfloat16 --torchcompile --model-ema --checkpoint-interval 5 --output_dir "$data/compiled")
launch=("$python" -m torch.distributed.run --nproc_per_node=1)

case $stage in
  1)
    optional nvidia-smi 20 nvidia-smi
    run 60 "$python" -m torch.utils.collect_env
    run 220 "${tests[@]}" -m "not slow" tests/gvt_ops/test_window_kernel.py
    run 240 "${tests[@]}" tests/test_gpu.py -k "not stopped_run and not compiled_step"
    ;;
  2)
    run 300 "${tests[@]}" tests/test_gpu.py -k "stopped_run or compiled_step"
    optional compute-sanitizer 240 compute-sanitizer --tool memcheck --error-exitcode 9 "${tests[@]}" \
      tests/gvt_ops/test_window_kernel.py -k "whole_windows or not_contiguous"
    ;;
  3)
    record 300 now TWINS_WINDOW_KERNEL=1 --tasks inference --repeats 20 --modes eager compiled graphs --no-memory --profile
    record 160 layout TWINS_WINDOW_KERNEL=1 TORCHINDUCTOR_LAYOUT_OPTIMIZATION=1 --tasks inference --repeats 20 --modes compiled --no-memory
    record 65 flash TWINS_WINDOW_KERNEL=1 TORCH_CUDNN_SDPA_DEPRIORITIZED=1 --tasks inference --repeats 20 --modes eager --no-memory
    record 65 sdpa TWINS_WINDOW_KERNEL=0 --tasks inference --repeats 20 --modes eager --no-memory
    ;;
  4)
    record 590 training TWINS_WINDOW_KERNEL=1 --tasks training --repeats 15 --modes eager compiled --profile
    ;;
  5)
    run 30 "$python" -m tools.digits "$data/digits"
    run 90 "$python" main.py "${model[@]}" --epochs 3 --fast-augment --output_dir "$data/float16"
    run 150 "${launch[@]}" main.py "${model[@]}" "${compiled[@]}"
    run 60 "${launch[@]}" main.py "${model[@]}" "${compiled[@]}" --resume auto
    for option in "" --channels-last --torchcompile; do
      run 85 "$python" main.py --throughput --model alt_gvt_small --batch-size 170 --amp-dtype bfloat16 ${option:+"$option"}
    done
    ;;
  6)
    run 240 "$python" -m tools.gpu_operators
    optional ncu 240 ncu --clock-control none -k 'regex:^forward$|^backward$' -c 4 --section SpeedOfLight --section Occupancy \
      --section WarpStateStats "$python" -m tools.gpu_operators --dims 64
    ;;
esac
[ -n "$dry" ] || echo "gpu_check.sh: stage $stage $([ $failed = 0 ] && echo passed || echo failed), see $out"
exit $failed
