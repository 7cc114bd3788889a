#!/usr/bin/env bash
# The figures of examples/results, on all GPUs of one host, in at most six minutes, with no network:
#     tests/gpu/run_figures.sh OUT_FOLDER [FLASHINFER_SO [QK_REFERENCE_PY]]
# rivals_nN.json: every way to reduce and normalise, by itself; decode_nN.json: a decode step by each of them. A wheel of
# apache-tvm-ffi that lies beside FLASHINFER_SO is unpacked. STEPS="decode": only these.
set -u
OUT=$(realpath -m "${1:?usage: run_figures.sh OUT_FOLDER [FLASHINFER_SO [QK_REFERENCE_PY]]}")
FLASHINFER=${2:+$(realpath -e "$2")} || exit
REFERENCE=${3:+$(realpath -e "$3")} || exit
cd "$(dirname "$0")/../.." || exit
mkdir -p "$OUT" || exit
LIMIT=350
. tests/gpu/steps.sh

N=$(python3 -c "import torch; print(torch.cuda.device_count())")
[ "${N:-0}" -ge 2 ] || { echo "torch sees ${N:-0} GPUs; two or more are needed"; exit 1; }
UNPACKED=$(mktemp -d)
trap 'rm -rf "$UNPACKED"' EXIT
for WHEEL in ${FLASHINFER:+"$(dirname "$FLASHINFER")"/*.whl}; do
    [ ! -e "$WHEEL" ] || python3 -m zipfile -e "$WHEEL" "$UNPACKED"
done
export PYTHONPATH="$UNPACKED:$PYTHONPATH"
nvidia-smi topo -m >"$OUT/topology.txt" 2>&1

HIDDEN="2048 4096 5120 8192"
step compile_rivals 100 python3 tests/gpu/bench_processes.py --size "$N" --compile-only --hidden $HIDDEN &
step compile_decode 100 python3 examples/bench decode --ranks "$N" --compile-only
wait
step rivals 110 python3 tests/gpu/bench_processes.py --size "$N" --out "$OUT/rivals_n$N.json" --hidden $HIDDEN \
    --seconds 80 --host "examples/results/all_reduce_rivals_n$N.json" ${FLASHINFER:+--flashinfer "$FLASHINFER"}
step decode 200 python3 examples/bench decode --ranks "$N" --output "$OUT/decode_n$N.json" --seconds 130 \
    ${FLASHINFER:+--flashinfer "$FLASHINFER"} ${REFERENCE:+--qk-reference "$REFERENCE"}
exit $STATUS
