"""The server: its parser is built and run when the module is imported, before any model config exists."""

import sys
import threading
import time
from pathlib import Path

from fastdeploy import envs
from fastdeploy.engine.args_utils import EngineArgs
from fastdeploy.engine.engine import LLMEngine
from fastdeploy.utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
parser.add_argument("--stop-after-steps", type=int, default=0)  # of this test host: SIGTERM the workers then
args = EngineArgs.add_cli_args(parser).parse_args()


def main():
    engine = LLMEngine(EngineArgs.from_cli_args(args).create_engine_config(), args.num_gpu_blocks_override)
    engine.start()
    if args.stop_after_steps:
        threading.Thread(target=stop_after, args=(engine, args.stop_after_steps), daemon=True).start()
    return engine.worker_proc.wait()


def stop_after(engine, steps):
    tokens = Path(envs.FD_LOG_DIR, "tokens.jsonl")
    while not tokens.exists() or len(tokens.read_text().splitlines()) < steps:
        time.sleep(0.1)
    engine.exit_sub_services()


if __name__ == "__main__":
    sys.exit(main())
