#!/usr/bin/env bash
# Fusion on against off, on one machine: throughput, time to the first token, and the outputs for the same prompts.
#
#   MODEL=zai-org/GLM-4.5-Air TP=4 examples/compare_serving.sh [more arguments for both servers]
#
# Writes examples/results/serving-<date>.json, losses included, and prints it as a table. REQUESTS and MAX_TOKENS set
# the load; SERVER_OFF and SERVER_ON replace the two commands (the tests run a stub).
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-zai-org/GLM-4.5-Air}
TP=${TP:-4}
PORT=${PORT:-8180}
FUSION_CONFIG=${FUSION_CONFIG:-'{}'}
CONCURRENCY=${CONCURRENCY:-1,8,64}
REQUESTS=${REQUESTS:-128}
MAX_TOKENS=${MAX_TOKENS:-256}
START_S=${START_S:-1800}
OUT=${OUT:-examples/results/serving-$(date -u +%Y%m%d-%H%M).json}
arguments=(--model "$MODEL" --tensor-parallel-size "$TP" --port "$PORT" "$@")
read -ra server_off <<< "${SERVER_OFF:-env FD_FUSION_DISABLE=1 python -m fastdeploy.entrypoints.openai.api_server}"
if [ -n "${SERVER_ON:-}" ]; then
    read -ra server_on <<< "$SERVER_ON"
else
    server_on=(python -m fd_fusion serve --fusion-config "$FUSION_CONFIG")
fi

scratch=$(mktemp -d)
server=
sockets() { find "${SOCKETS:-/dev/shm}" -maxdepth 1 -name 'fd_task_queue_*.sock' -user "$(id -u)" 2> /dev/null | sort; }
stop() {
    [ -n "$server" ] || return 0
    kill -TERM -- "-$server" 2> /dev/null || true
    wait "$server" 2> /dev/null || true
    server=
    # FastDeploy leaves the socket of its task queue, and the next server on that port dies of it.
    comm -13 "$scratch/sockets" <(sockets) | xargs -r rm -f
}
trap 'stop; rm -rf "$scratch"' EXIT

measure() { # name, then the server's command
    local name=$1
    shift
    sockets > "$scratch/sockets"
    setsid env FD_LOG_DIR="$scratch/$name" "$@" "${arguments[@]}" > "$scratch/$name.out" 2>&1 &
    server=$!
    if ! python examples/compare_serving.py measure --url "http://127.0.0.1:$PORT" --pid "$server" \
        --start-s "$START_S" --concurrency "$CONCURRENCY" --requests "$REQUESTS" --max-tokens "$MAX_TOKENS" \
        --out "$scratch/$name.json"; then
        tail -n 40 "$scratch/$name.out" >&2
        return 1
    fi
    # Our own log alone: others beside it hold the whole environment, secrets too.
    grep -hs "fd_fusion" "$scratch/$name/fd_fusion.log" | grep -v "fd_fusion metrics" | sort -u | tail -n 5 > "$scratch/$name.said" || true
    stop
}

measure off "${server_off[@]}"
measure on "${server_on[@]}"
mkdir -p "$(dirname "$OUT")"
python examples/compare_serving.py report --off "$scratch/off.json" --on "$scratch/on.json" \
    --said "$scratch/on.said" --out "$OUT" --model "$MODEL" --tp "$TP"
