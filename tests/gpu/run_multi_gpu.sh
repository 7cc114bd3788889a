#!/usr/bin/env bash
# Correctness and speed on all GPUs of one host, in at most eight minutes, with no network:
#     tests/gpu/run_multi_gpu.sh OUT_FOLDER [FLASHINFER_SO]
# ONLY=EXPRESSION selects tests. On one GPU the processes share it through MPS: a rehearsal, whose times mean nothing.
set -u
cd "$(dirname "$0")/../.."
OUT=${1:?usage: run_multi_gpu.sh OUT_FOLDER [FLASHINFER_SO]}
FLASHINFER=${2:-}
mkdir -p "$OUT"
# NVLink multicast stays off: a program that dies while it uses it can take the GPUs out of service.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CUDA_MODULE_LOADING=EAGER
GPUS=$(nvidia-smi -L | wc -l)
nvidia-smi topo -m >"$OUT/topology.txt" 2>&1

SIZES=$([ "$GPUS" = 1 ] && echo 2 || for N in 2 4 8; do [ "$N" -le "$GPUS" ] && echo "$N"; done)
for N in $SIZES; do
    python3 tests/gpu/bench_processes.py --size "$N" --compile-only &
done
timeout -k 5 200 python3 -m pytest -q -rA -p no:cacheprovider -o addopts= tests/gpu/test_processes.py \
    --durations=0 ${ONLY:+-k "$ONLY"} >"$OUT/correctness.log" 2>&1
STATUS=$?
wait
grep -E "passed|failed|^(PASSED|FAILED|ERROR)|us a call|host time" "$OUT/correctness.log"

bench() {
    timeout -k 5 "$2" python3 tests/gpu/bench_processes.py --size "$1" --out "$OUT/all_reduce_n$1.json" \
        --seconds "$(($2 - 40))" ${FLASHINFER:+--flashinfer "$FLASHINFER"} "${@:3}" || STATUS=1
}

if [ "$GPUS" = 1 ]; then
    MPS=$(mktemp -d)
    export CUDA_MPS_PIPE_DIRECTORY=$MPS/pipe CUDA_MPS_LOG_DIRECTORY=$MPS/log
    mkdir "$MPS/pipe" "$MPS/log"
    nvidia-cuda-mps-control -d
    bench 2 70 --no-nccl --hidden 4096 --rows 1 8 64 --rounds 5
    echo quit | nvidia-cuda-mps-control
else
    for N in $SIZES; do
        bench "$N" $((240 / $(wc -w <<<"$SIZES")))
    done
fi
exit $STATUS
