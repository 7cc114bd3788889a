#!/usr/bin/env bash
# GLM-4.5-Air with fusion on, from install to rollback, where FastDeploy serves it already.
#
#   examples/serve.sh install     put fd_fusion beside FastDeploy
#   examples/serve.sh serve       start the server with fusion on
#   examples/serve.sh status      the line that says what is fused
#   examples/serve.sh rollback    the same server as before
#
# MODEL, TP, PORT, FUSION_CONFIG and FD_LOG_DIR say what and where; everything after the step goes to the api server.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-zai-org/GLM-4.5-Air}
TP=${TP:-4}
PORT=${PORT:-8180}
FUSION_CONFIG=${FUSION_CONFIG:-'{}'}
export FD_LOG_DIR=${FD_LOG_DIR:-log}
server_arguments=(--model "$MODEL" --tensor-parallel-size "$TP" --port "$PORT")

step=${1:-}
[ $# -gt 0 ] && shift
case "$step" in
install)
    # --no-deps: PyPI's newest paddlepaddle-gpu is 2.6.2, and it must not replace the one that FastDeploy runs on.
    pip install --no-deps .
    if python -m fd_fusion --help | grep -q doctor; then python -m fd_fusion doctor || true; fi
    ;;
serve)
    # Our argument is taken out and travels in the environment; FastDeploy itself is not changed. When the ranks have
    # loaded the model, this prints on stderr, and writes into $FD_LOG_DIR/fd_fusion.log, for example
    #   fd_fusion: on: 92 sites, triton one-shot <= 64 rows (built in), workspace 6 MB, group [0..3], config from --fusion-config
    exec python -m fd_fusion serve --fusion-config "$FUSION_CONFIG" "${server_arguments[@]}" "$@"
    ;;
status)
    # One line a rank; "off: ..." and "... stock: ..." tell the reason, and every reason names its remedy.
    grep -h "fd_fusion" "$FD_LOG_DIR/fd_fusion.log" | grep -v "fd_fusion metrics" | sort -u | tail -n 20
    ;;
rollback)
    # Nothing of the host or of the checkpoint was touched, so the way back is not to ask. FD_FUSION_DISABLE=1 holds
    # even where FD_FUSION_CONFIG or a patched --fusion-config still asks.
    exec env FD_FUSION_DISABLE=1 python -m fastdeploy.entrypoints.openai.api_server "${server_arguments[@]}" "$@"
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
