"""`python examples/bench`: all-reduce, decode and qk-norm, measured on GPUs, and checked before that."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

# Each module has `add_arguments(parser)` and `run(args) -> exit code`.
BENCHES = {
    "all-reduce": ("bench.all_reduce", "all-reduce + residual + RMSNorm against FlashInfer's kernel"),
    "decode": ("bench.decode", "a decode step on several GPUs, by every way of reducing"),
    "qk-norm": ("bench.qk_rms_norm", "RMSNorm of q and k against a reference kernel and the device's copy"),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="examples/bench", description=__doc__)
    commands = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name, (module, text) in BENCHES.items():
        module = importlib.import_module(module)
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    missing = None if getattr(args, "render", None) else _missing(args.bench != "decode")
    if missing is not None:
        print(f"bench: {missing}; run this on a machine with an NVIDIA GPU and torch", file=sys.stderr)
        return 1
    try:
        return args.run(args)
    except json.JSONDecodeError as error:  # of --render
        print(f"bench: {args.render}: this is no JSON: {error}", file=sys.stderr)
        return 2


def _missing(gpu: bool) -> str | None:
    """What the measurements lack here, or None."""
    try:
        import torch
    except ImportError as error:
        return str(error)
    return "torch sees no GPU" if gpu and not torch.cuda.is_available() else None
