"""`python -m fd_fusion demo`: a tensor-parallel decoder of GLM-4.5's structure, run stock and bound, and compared.

This process writes the checkpoint, computes the truth in NumPy, starts the ranks, and judges.
Exit code: 0 when the numbers agree, 1 when they do not or a rank failed, 2 for bad arguments or a full disk, 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fd_fusion.cli.demo import report as demo_report
from fd_fusion.cli.demo.checkpoint import Checkpoint, write_checkpoint
from fd_fusion.cli.demo.config import DecoderConfig
from fd_fusion.cli.demo.rank import count_steps
from fd_fusion.cli.demo.reference import Truth, make_truth
from fd_fusion.cli.doctor.packages import PADDLE, version_of
from fd_fusion.cli.messages import Parser, progress_line, say, to_json
from fd_fusion.cli.processes.ranks import RanksFailed, free_ports, run_ranks
from fd_fusion.cli.processes.run_folder import run_folder
from fd_fusion.cli.processes.signals import ending_well
from fd_fusion.config import BACKENDS, FusionConfig
from fd_fusion.frameworks.paddle_runtime import too_old
from fd_fusion.reasons import FusionError, because

# option -> (key of config.json, help). The defaults are those of DecoderConfig.
SIZES = {
    "hidden-size": ("hidden_size", "width of the residual stream"),
    "layers": ("num_hidden_layers", "decoder layers; the first has a dense MLP, the others experts"),
    "heads": ("num_attention_heads", "query heads"),
    "kv-heads": ("num_key_value_heads", "key and value heads; a multiple of --nproc, as each rank holds its own"),
    "head-dim": ("head_dim", "size of a head"),
    "intermediate-size": ("intermediate_size", "width of the dense MLP"),
    "moe-intermediate-size": ("moe_intermediate_size", "width of an expert"),
    "experts": ("n_routed_experts", "routed experts of a layer"),
    "top-k": ("num_experts_per_tok", "experts that a token is routed to"),
    "vocab-size": ("vocab_size", "tokens known"),
}


def main(argv: list[str]) -> int:
    """Run the command. Every error is one sentence on stderr; Ctrl-C goes on to the caller once all is clean."""
    args = _parser().parse_args(argv)
    try:
        with ending_well():
            return _demo(args)
    except ValueError as error:
        return say(error, 2)
    except FusionError as error:
        return say(error, 1)
    except RanksFailed as error:
        return say(error.with_log(), 1)


def _parser() -> Parser:
    parser = Parser(prog="fd-fusion demo", description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2, help="ranks, each a process (default: 2)")
    sizes = parser.add_argument_group("sizes of the decoder")
    for option, (key, text) in SIZES.items():
        default = getattr(DecoderConfig, key)
        sizes.add_argument(f"--{option}", dest=key, type=int, help=f"{text} (default: {default})")
    sizes.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a GLM-4.5 checkpoint to load, in place of sizes"
    )
    text = "an FP8 model: what reads a norm takes it in FP8, the rest is bfloat16"
    parser.add_argument("--quantised", action="store_true", help=text)
    parser.add_argument("--prompt-len", type=int, default=12, help="tokens of the prefill (default: 12)")
    parser.add_argument("--steps", type=int, default=4, help="decode steps after it (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the prompt (default: 0)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what fuses (default: auto)")
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), default="cpu", help="gpu: one a rank, over NCCL (default: cpu)"
    )
    parser.add_argument("--max-token-num", type=int, help="the most rows of a call that is fused")
    parser.add_argument("--timeout-s", type=float, default=30.0, help="wait for a missing rank (default: 30)")
    parser.add_json()
    return parser


def _demo(args: argparse.Namespace) -> int:
    sizes = {key: getattr(args, key) for key, _ in SIZES.values() if getattr(args, key) is not None}
    fusion = FusionConfig(backend=args.backend, max_token_num=args.max_token_num, timeout_s=args.timeout_s)
    if args.checkpoint and sizes:
        raise ValueError("--checkpoint brings its own sizes; leave the options for sizes away")
    for name, least in (("prompt_len", 1), ("steps", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number from {least}")
    config = None if args.checkpoint else DecoderConfig(**sizes, quantised=args.quantised)
    if config:
        config.check_ranks(args.nproc, args.backend)
    _check_packages(args.backend)
    with run_folder("demo_") as folder, progress_line("making the checkpoint") as show:
        if config:
            write_checkpoint(folder, config, args.seed)
        checkpoint = Checkpoint(args.checkpoint or folder, args.quantised)
        checkpoint.config.check_ranks(args.nproc, args.backend)
        truth, results = _run(checkpoint, fusion, args, show)
    outcome = demo_report.judge(checkpoint.config, args.nproc, args.device, truth, results)
    print(to_json(outcome, 2) if args.json else "\n".join(demo_report.lines(outcome)))
    return 0 if outcome["agree"] else 1


def _check_packages(backend: str) -> None:
    """Raise FusionError for what the ranks would miss, without the second that importing Paddle takes."""
    if importlib.util.find_spec("paddle") is None:
        raise FusionError(because("no_paddle", detail="no module named 'paddle'"))
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        raise FusionError(because("no_triton", detail="no module named 'triton'"))
    for version in filter(None, map(version_of, PADDLE)):
        if refusal := too_old(version):
            raise FusionError(refusal)


def _run(
    checkpoint: Checkpoint, fusion: FusionConfig, args: argparse.Namespace, show: Callable[[str], None]
) -> tuple[Truth, list[dict[str, Any]]]:
    """Compute the truth, then run the ranks on its tokens."""
    show("computing the same in float64")
    prompt = np.random.default_rng(args.seed).integers(checkpoint.config.vocab_size, size=args.prompt_len).tolist()
    truth = make_truth(checkpoint, prompt, args.steps)
    job = {
        "checkpoint": str(checkpoint.folder.resolve()),
        "quantised": args.quantised,
        "tokens": truth.tokens,
        "prompt_len": args.prompt_len,
        "config": fusion.to_dict(),
        "device": args.device,
        "ports": free_ports(1 + args.nproc),
    }
    env = {"NVIDIA_TF32_OVERRIDE": "0"}  # the budget is that of float32
    if args.device == "cpu" and args.backend == "triton":
        env["TRITON_INTERPRET"] = "1"
    total = count_steps(args.steps, args.quantised)
    how = {"timeout_s": 10 * args.timeout_s, "watch": lambda done: show(f"ranks: step {done} of {total}")}
    return truth, run_ranks("demo.rank", args.nproc, job, env=env, **how)
