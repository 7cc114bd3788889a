"""The server: its parser is built and run when the module is imported, before any model config exists."""

import sys
import threading

from fastdeploy.engine.args_utils import EngineArgs
from fastdeploy.engine.engine import LLMEngine
from fastdeploy.utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
parser.add_argument("--stop-after", type=float, default=0)  # of this test host: SIGTERM the workers then
args = EngineArgs.add_cli_args(parser).parse_args()


def main():
    engine = LLMEngine(EngineArgs.from_cli_args(args).create_engine_config(), args.num_gpu_blocks_override)
    engine.start()
    if args.stop_after:
        threading.Timer(args.stop_after, engine.exit_sub_services).start()
    return engine.worker_proc.wait()


if __name__ == "__main__":
    sys.exit(main())
