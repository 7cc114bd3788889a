"""`python -m fd_fusion tune`: up to how many rows is fusing faster than all-reduce and norm on this machine?

Measures one-shot, two-shot, FlashInfer and the unfused path by graph replay, the slowest rank counting, and keeps the
limits for `bind`. Exit code: 0 measured, 1 something failed, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
from collections.abc import Callable
from typing import Any

from fd_fusion import __version__
from fd_fusion.cli.doctor import child as doctor_child
from fd_fusion.cli.messages import Parser, progress_line, say, to_json
from fd_fusion.cli.processes.ranks import RanksFailed, free_ports, run_ranks
from fd_fusion.cli.processes.signals import ending_well
from fd_fusion.cli.tune import limits as tune_limits
from fd_fusion.config import FusionConfig
from fd_fusion.kernels.all_reduce.plan import plan_for
from fd_fusion.reference import DTYPE_BYTES
from fd_fusion.tuning.table import Fingerprint, Limits, store_limits, table_lock, table_path, versions_here

_ROUNDS = {"cpu": 3, "gpu": 11}
_ROWS = {"cpu": "1,2", "gpu": "1,2,4,8,16,32,48,64,96,128,192,256,384,512,768,1024,1536,2048"}


def main(argv: list[str]) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.nproc not in range(2, 9) or args.hidden_size < 1:
        parser.error(f"--nproc {args.nproc} --hidden-size {args.hidden_size}: give 2 to 8 ranks and a hidden size")
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: give a number from 1")
    try:
        FusionConfig(workspace_mb=args.workspace_mb, timeout_s=args.timeout_s)  # has the bounds of both
        plan_for(args.nproc, args.hidden_size, args.dtype)  # refuses a hidden size that no kernel takes
        with ending_well(), progress_line(f"starting {args.nproc} ranks") as show:
            outcome = tune(args, show)
    except ValueError as error:
        parser.error(str(error))
    except BlockingIOError:
        return say("another tune is running: wait for it, or end it", 1)
    except OSError as error:
        folder = getattr(table_path(), "parent", "a home folder")
        return say(
            f"the table cannot be kept in {folder} ({error.strerror}): set XDG_CACHE_HOME to a folder of yours", 1
        )
    except RanksFailed as error:
        return say(f"nothing was stored: {error.with_log()}", 1)
    except KeyboardInterrupt:
        return say("interrupted; nothing was stored", 130)
    print(to_json(outcome, 2) if args.json else "\n".join(lines(outcome)))
    return 0 if tune_limits.by_backend(outcome["times"]) else 1


def _parser() -> Parser:
    parser = Parser(prog="fd-fusion tune", description=__doc__.partition(": ")[2].partition("\n")[0])
    parser.add_argument("--nproc", type=int, default=2, help="tensor-parallel ranks, 2 to 8 (default: 2)")
    parser.add_argument("--hidden-size", type=int, required=True, help="exact hidden size H of the model")
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bfloat16", help="of all tensors (default: bfloat16)")
    parser.add_argument("--rows", help="numbers of rows to measure, such as 1,8,64")
    parser.add_argument("--rounds", type=int, help="measurements, of which the median counts (default: 11)")
    mb = FusionConfig.workspace_mb
    parser.add_argument("--workspace-mb", type=int, default=mb, help=f"as in the fusion config (default: {mb})")
    parser.add_argument("--timeout-s", type=float, default=30.0, help="wait for a missing rank (default: 30)")
    parser.add_json()
    return parser


def tune(args: argparse.Namespace, show: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure, and store the limits if the rival was measured too. `show` gets the measurements, n of m.

    Raises: ValueError: bad rows. RanksFailed: a rank failed. OSError: the table cannot be kept.
    """
    here = _framework()
    mode = here["device"]
    if mode == "gpu" and here["gpus"] < args.nproc:
        raise RanksFailed(f"tune needs a GPU for each rank, and finds {here['gpus']} for {args.nproc} ranks")
    rows = _rows(args.rows or _ROWS[mode])
    path = table_path()
    if path is None and mode == "gpu":
        raise OSError(errno.ENOENT, "this user has none")
    # Held while measuring, so that no two disturb each other; and a folder that cannot be written shows at once.
    with table_lock(path) if mode == "gpu" else contextlib.nullcontext():
        try:
            results = _measure(args, mode, rows, show)
        except OSError as error:  # not the table's
            raise RanksFailed(f"the ranks could not be started: {error}") from None
        outcome = _outcome(args, mode, results)
        if mode == "gpu" and outcome["limits"]:
            key = Fingerprint(outcome["gpu"], args.nproc, args.hidden_size, args.dtype, outcome["versions"])
            store_limits(key, Limits.from_dict(outcome["limits"]), path)
            outcome["stored"] = str(path)
    return outcome


def _outcome(args: argparse.Namespace, mode: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what `--json` prints; `results`: of each rank."""
    times = tune_limits.merge([one["times"] for one in results])
    limits = tune_limits.find_limits(times)
    return {
        "schema": 1,
        "fd_fusion": __version__,
        "mode": mode,
        "size": args.nproc,
        "hidden_size": args.hidden_size,
        "dtype": args.dtype,
        "gpu": results[0]["gpu"],
        "versions": versions_here(),
        "times": times,
        "skipped": {name: why for one in reversed(results) for name, why in one["skipped"].items()},
        "rival": results[0].get("rival") or None,
        "limits": limits.to_dict() if limits else None,
        "stored": None,
    }


def _framework() -> dict[str, Any]:
    """What runs here, asked in a child process: this one stays free of any framework and its CUDA context."""
    found = doctor_child.ask("framework", 2)
    here = next((one for one in found if one.name == "import"), found[0])
    if here.state != "ok":
        raise RanksFailed(here.text)
    return here.data


def _measure(
    args: argparse.Namespace, mode: str, rows: list[int], show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run the ranks. A job has the options by their names."""
    job = {**vars(args), "rows": rows, "rounds": args.rounds or _ROUNDS[mode], "ports": free_ports(1 + args.nproc)}
    limit_s = (120 if mode == "cpu" else 900) + 10 * args.timeout_s  # FlashInfer may have to compile
    env = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    if mode == "cpu":
        env = {"TRITON_INTERPRET": "1"}
    total = len(rows) * len(tune_limits.COLUMNS)

    def watch(done: int) -> None:
        show(f"measuring on {args.nproc} ranks, {done} of {total}")

    return run_ranks("tune.rank", args.nproc, job, timeout_s=limit_s, env=env, watch=watch)


def _rows(text: str) -> list[int]:
    try:
        rows = sorted({int(part) for part in text.split(",")})
    except ValueError:
        rows = []
    if not rows or rows[0] < 1 or rows[-1] > 1 << 16:
        raise ValueError(f"--rows {text}: give numbers from 1, such as 1,8,64")
    return rows


def lines(outcome: dict[str, Any]) -> list[str]:
    """The outcome for people."""
    where = f"{outcome['gpu']}, one GPU a rank"
    if outcome["mode"] == "cpu":
        where = "Triton's interpreter on a CPU: a check of the machinery, these figures mean nothing"
    out = [f"fd_fusion tune: {outcome['size']} ranks, H={outcome['hidden_size']}, {outcome['dtype']}; {where}", ""]
    out += _table(outcome["times"])
    out += [f"{name}: not measured: {why}" for name, why in outcome["skipped"].items()]
    if outcome["rival"]:
        out.append(f"unfused: {outcome['rival']}")
    limits = outcome["limits"]
    if limits and outcome["mode"] == "gpu":
        for name, rows in limits["rows"].items():
            out.append(f"{name}: fusing wins up to {rows} rows" if rows else f"{name}: fusing never wins")
        if limits["staying_rows"]:
            out.append(f"triton: up to {limits['staying_rows']} rows where a residual stays with its owners")
        if limits["two_shot_rows"]:
            out.append(f"triton: two-shot from {limits['two_shot_rows']} rows on")
    if outcome["stored"]:
        out.append(f"stored in {outcome['stored']}: the next bind reads it")
    elif outcome["mode"] == "cpu":
        out.append("not stored: figures of a CPU mean nothing")
    else:
        out.append("not stored: without the unfused rival nobody can tell up to where fusing wins")
    return out


def _table(times: dict[str, dict[int, float]]) -> list[str]:
    """Rows by columns, microseconds a call of the slowest rank."""
    out = [f"{'rows':>6}" + "".join(f"{name.replace('_', '-'):>12}" for name in tune_limits.COLUMNS) + "   us a call"]
    for rows in sorted({t for mine in times.values() for t in mine}):
        cells = [times.get(name, {}).get(rows) for name in tune_limits.COLUMNS]
        out.append(f"{rows:>6}" + "".join(f"{'' if cell is None else f'{cell:.2f}':>12}" for cell in cells))
    return out
