#!/usr/bin/env bash
# Everything that one GPU can check and time, in at most nine minutes, with no network and without Paddle:
#     tests/gpu/run_one_gpu.sh OUT_FOLDER [FLASHINFER_SO ...]
# QK_REFERENCE=FILE: FastDeploy's own QK kernel, for the second benchmark. STEPS="ranks tune": only these.
set -u
OUT=$(realpath -m "${1:?usage: run_one_gpu.sh OUT_FOLDER [FLASHINFER_SO ...]}")
FLASHINFER=()
for library in "${@:2}"; do FLASHINFER+=("$(realpath -e "$library")") || exit; done
[ -z "${QK_REFERENCE:-}" ] || QK_REFERENCE=$(realpath -e "$QK_REFERENCE") || exit
cd "$(dirname "$0")/../.."
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CUDA_MODULE_LOADING=EAGER
STATUS=0

step() { # NAME SECONDS COMMAND...: a step that hangs is ended, and the next one runs
    [[ " ${STEPS:-$1} " == *" $1 "* ]] || return
    local begin=$SECONDS left=$((530 - SECONDS))
    timeout -k 5 "$((left < $2 ? left > 0 ? left : 1 : $2))" "${@:3}" >"$OUT/$1.log" 2>&1
    local status=$?
    echo "$1: status $status, $((SECONDS - begin)) s: $(tail -1 "$OUT/$1.log")"
    [ $status = 0 ] || STATUS=1
}

tests() { # NAME SECONDS WORKERS FILE
    step "$1" "$2" python3 -m pytest -q -rA -p no:cacheprovider -o addopts= --durations=0 -n "$3" "tests/gpu/$4"
}

tests ranks 150 4 test_all_reduce_virtual_ranks.py
tests qk 90 8 test_qk_norm.py
tests processes 150 0 test_processes.py
step doctor 60 python3 -m fd_fusion doctor --json
step tune 60 python3 -m fd_fusion tune --nproc 2 --hidden-size 4096 --rows 1,8,16 --json
step bench_all_reduce 180 python3 -m fd_fusion bench all-reduce --limit_s 60 --output "$OUT/all_reduce.json" \
    --flashinfer "${FLASHINFER[@]}"
[ -z "${QK_REFERENCE:-}" ] || step bench_qk_norm 100 python3 -m fd_fusion bench qk-norm \
    --output "$OUT/qk_norm.json" --reference "$QK_REFERENCE"
exit $STATUS
