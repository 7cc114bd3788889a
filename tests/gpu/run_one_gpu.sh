#!/usr/bin/env bash
# Everything that one GPU can check and time, in at most nine minutes, with no network and without Paddle:
#     tests/gpu/run_one_gpu.sh OUT_FOLDER [FLASHINFER_SO ...]
# QK_REFERENCE=FILE: FastDeploy's own QK kernel, for the second benchmark. STEPS="ranks doctor": only these.
set -u
OUT=$(realpath -m "${1:?usage: run_one_gpu.sh OUT_FOLDER [FLASHINFER_SO ...]}")
FLASHINFER=()
for library in "${@:2}"; do FLASHINFER+=("$(realpath -e "$library")") || exit; done
[ -z "${QK_REFERENCE:-}" ] || QK_REFERENCE=$(realpath -e "$QK_REFERENCE") || exit
cd "$(dirname "$0")/../.." || exit
mkdir -p "$OUT" || exit
LIMIT=530
. tests/gpu/steps.sh

tests ranks 130 4 test_all_reduce_virtual_ranks.py
tests qk 90 8 test_qk_norm.py
processes 200
step doctor 60 python3 -m fd_fusion doctor --json
# Three N; what they have measured is written when the last one has ended. 60 s are kept for the other benchmark.
EACH=$((($(left) - 75) / 3))
EACH=$((EACH > 60 ? 60 : EACH > 15 ? EACH : 15))
step bench_all_reduce $((3 * EACH + 15)) python3 examples/bench all-reduce --limit_s $EACH \
    --output "$OUT/all_reduce.json" --flashinfer "${FLASHINFER[@]}"
[ -z "${QK_REFERENCE:-}" ] || step bench_qk_norm 100 python3 examples/bench qk-norm \
    --output "$OUT/qk_norm.json" --reference "$QK_REFERENCE"
exit $STATUS
