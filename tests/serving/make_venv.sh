#!/usr/bin/env bash
# A virtual environment in which FastDeploy's server runs on CPUs: make_venv.sh FOLDER  (1.1 GB, two minutes)
# Then: FASTDEPLOY_SRC=/path/to/FastDeploy FOLDER/bin/python -m pytest tests/serving
set -euo pipefail
folder=${1:?make_venv.sh FOLDER}
repository=$(cd "$(dirname "$0")/../.." && pwd)
python3 -m venv "$folder"
pip=("$folder/bin/python" -m pip install -q)
"${pip[@]}" "setuptools>=68" wheel paddlepaddle==3.3.1 pytest safetensors tokenizers prometheus-client triton \
    "numpy<3" fastapi uvicorn gunicorn pyzmq aiozmq openai redis httpx aiohttp msgspec msgpack orjson \
    opentelemetry-{api,sdk,instrumentation-fastapi,instrumentation-logging,exporter-otlp} \
    "transformers>=4.55,<5" "huggingface-hub<1" modelscope datasets sentencepiece tiktoken jinja2 partial_json_parser \
    ruamel.yaml einops setproctitle crcmod tabulate py-cpuinfo psutil colorlog ml_dtypes omegaconf \
    importlib_metadata multiprocess scipy scikit-learn six
"${pip[@]}" imageio imageio-ffmpeg proglog decorator decord  # release/2.6 reads videos
"${pip[@]}" --no-deps paddleformers==1.1.1 aistudio-sdk moviepy
"${pip[@]}" --no-deps --no-build-isolation -e "$repository"
