"""Processes that end with the one that started them, whatever ends that one, and are in no job of it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import fd_fusion

PARENT = "FD_FUSION_PARENT"  # the id of the process that a child must not outlive
_PR_SET_PDEATHSIG = 1
# What a launcher reads, or passes to its ranks: with PADDLE_NNODES=2, one of ours would wait for a second machine.
_OF_A_JOB = (
    "PADDLE_",
    "MASTER_",
    "COLLECTIVE_MASTER_",
    "POD_IP",
    "PORT_RANGE",
    "FLAGS_selected_",
    "FLAGS_FIXED_PORT",
)


def child_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a child that imports this package and is in no job of this process."""
    env = {name: value for name, value in environ.items() if not name.startswith(_OF_A_JOB)}
    folder = str(Path(fd_fusion.__file__).parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, environ.get("PYTHONPATH")]))
    return {**env, PARENT: str(os.getpid())}


def end_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel end this process with its parent, or with the thread of the parent that started it.

    The parent is the one in the variable `PARENT`; without it nothing is done.
    """
    parent = int(os.environ.get(PARENT, 0))
    if not parent:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it went before we asked
        os._exit(1)


def main() -> None:
    """Become the command of `python -m fd_fusion.cli.processes.tied [--term] COMMAND ...`.

    It stays tied: it is killed, or with --term asked to end, as a server that has processes of its own to end.
    """
    politely = sys.argv[1] == "--term"
    end_with_parent(signal.SIGTERM if politely else signal.SIGKILL)
    os.environ[PARENT] = str(os.getpid())  # what it starts may be tied to it
    command = sys.argv[1 + politely :]
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
