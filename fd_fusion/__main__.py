"""`python -m fd_fusion COMMAND ...`, also installed as `fd-fusion`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any

from fd_fusion import __version__
from fd_fusion.cli.messages import Parser, say

# Each module has `main(argv) -> exit code` and is imported only when its command is given.
COMMANDS = {
    "serve": ("fd_fusion.cli.serve", "run FastDeploy's api server with fusion on"),
    "demo": ("fd_fusion.cli.demo.command", "run a small tensor-parallel decoder, stock and fused, and compare"),
    "doctor": ("fd_fusion.cli.doctor.command", "whether fusion works on this machine, and what to do if it does not"),
    "tune": ("fd_fusion.cli.tune.command", "measure up to how many rows fusing wins, and keep it for `bind`"),
    "patch": ("fd_fusion.cli.patch", "the patches of FastDeploy, and whether one applies to a source tree"),
    "reasons": ("fd_fusion.cli.list_reasons", "every reason why something is off, and what to do about it"),
}


def main(argv: list[str] | None = None) -> int:
    """Hand the arguments after the command to its module; with no command, print the help."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = Parser(
        prog="fd-fusion",
        description="All-reduce + residual + RMSNorm in one kernel, for PaddlePaddle and FastDeploy.",
        epilog=f"commands:\n{listing}\n\n`python -m fd_fusion COMMAND --help` lists the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fd_fusion {__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    command = parser.parse_args(argv[:1]).command
    if command is None:
        parser.print_help()
        return 0
    try:
        os.getcwd()
    except FileNotFoundError:
        return say("the working folder is not there any more; change to one that is", 2)
    try:
        code = _module(command).main(argv[1:])
        print(end="", flush=True)
        return code
    except KeyboardInterrupt:
        return say("interrupted", 130)
    except BrokenPipeError:  # `| head`: no reader any more. At exit Python flushes once more
        _forget_output()
        return 141  # as a shell does for SIGPIPE
    except OSError as error:  # what the machine refuses: a full disk, another user's folder, no more processes
        try:
            sys.stdout.flush()
        except OSError:
            _forget_output()
        return say(error, 2)


def _forget_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _module(command: str) -> Any:
    try:
        return importlib.import_module(COMMANDS[command][0])
    except ModuleNotFoundError as error:
        sys.exit(say(f'{error}; install it, for example with pip install -e ".[cpu]"', 1))


if __name__ == "__main__":
    sys.exit(main())
