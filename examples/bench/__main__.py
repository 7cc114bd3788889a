"""`python examples/bench all-reduce` and `python examples/bench qk-norm`; see `command.py`."""

import sys
from pathlib import Path

sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])  # for `bench`, and for `fd_fusion` of this checkout

from bench.command import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
