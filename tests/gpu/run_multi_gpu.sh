#!/usr/bin/env bash
# Correctness, speed and `tune` on all GPUs of one host, in at most eight minutes, with no network:
#     tests/gpu/run_multi_gpu.sh OUT_FOLDER [FLASHINFER_SO]
# STEPS="processes bench_n4": only these. limits.json in OUT's fd_fusion folder is the table that `tune` stored.
# On one GPU the processes share it through MPS: a rehearsal, whose times mean nothing.
set -u
OUT=$(realpath -m "${1:?usage: run_multi_gpu.sh OUT_FOLDER [FLASHINFER_SO]}")
FLASHINFER=${2:+$(realpath -e "$2")} || exit
cd "$(dirname "$0")/../.." || exit
mkdir -p "$OUT" || exit
LIMIT=470
. tests/gpu/steps.sh

GPUS=$(python3 -c "import torch; print(torch.cuda.device_count())")
[ "${GPUS:-0}" -ge 1 ] || { echo "torch sees no GPU"; exit 1; }
nvidia-smi topo -m >"$OUT/topology.txt" 2>&1
SIZES=$([ "$GPUS" = 1 ] && echo 2 || for N in 8 4 2; do [ "$N" -gt "$GPUS" ] || echo "$N"; done)

for N in $SIZES; do
    timeout -k 5 150 python3 tests/gpu/bench_processes.py --size "$N" --compile-only &
done
processes 260 # 184 s by itself; a slow host with both at once took more than 200
wait
grep -hE "us a call|host time" "$OUT/replays.log"

bench() { # N SECONDS: the first 30 s of them to start, the last 15 to end what hangs
    step "bench_n$1" "$2" python3 tests/gpu/bench_processes.py --size "$1" --out "$OUT/all_reduce_n$1.json" \
        --seconds $(($2 - 45)) ${FLASHINFER:+--flashinfer "$FLASHINFER"} "${@:3}"
}

if [ "$GPUS" = 1 ]; then
    MPS=$(mktemp -d)
    export CUDA_MPS_PIPE_DIRECTORY=$MPS/pipe CUDA_MPS_LOG_DIRECTORY=$MPS/log
    mkdir "$MPS/pipe" "$MPS/log"
    trap 'echo quit | timeout 30 nvidia-cuda-mps-control; rm -rf "$MPS"' EXIT
    nvidia-cuda-mps-control -d
    bench 2 75 --no-nccl --hidden 4096 --rows 1 8 64 --rounds 5
    exit $STATUS
fi
for N in $SIZES; do bench "$N" 100; done
for H in 8192 4096 6144 7168 5120; do # as many as there is time for, some half a minute each
    for N in $SIZES; do
        [ "$(left)" -lt 60 ] || step tune 60 env XDG_CACHE_HOME="$OUT" \
            python3 -m fd_fusion tune --nproc "$N" --hidden-size "$H"
    done
done
rm -f "$OUT/fd_fusion/limits.lock"
exit $STATUS
