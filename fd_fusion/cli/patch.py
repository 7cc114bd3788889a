"""`python -m fd_fusion patch`: the patches of FastDeploy, and whether one applies to a source tree."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fd_fusion
from fd_fusion.cli.messages import Parser, say, to_json

_HOME = Path(fd_fusion.__file__).parent
# A wheel holds a copy, made when it is built; a clone has the folder itself.
FOLDER = next((folder for folder in (_HOME / "patches", _HOME.parent / "patches") if folder.is_dir()), None)
_SAYS = {
    "unchecked": "give --tree to check it",
    "applies": "it applies; to apply it",
    "applied": "it is applied already; to take it back",
    "differs": "it does not apply to this tree; `python -m fd_fusion serve` needs no patch",
}


def main(argv: list[str]) -> int:
    """Print each patch. Exit code: 0, 1 where none applies or is applied, 2 for bad arguments."""
    args = _parser().parse_args(argv)
    if args.tree and not (args.tree / "fastdeploy").is_dir():
        return say(f"--tree {args.tree}: there is no folder fastdeploy in it", 2)
    if args.tree and not shutil.which("git"):
        return say("git is not found, which finds the places of a patch: install it", 2)
    if FOLDER is None:
        return say("this installation holds no patches: build it from a whole source tree", 2)
    found = [_look_at(path, args.tree) for path in sorted(FOLDER.glob("*.patch"))]
    print(to_json({"patches": found}, 2) if args.json else "\n".join(map(_for_people, found)))
    return 0 if any(one["state"] != "differs" for one in found) else 1


def _parser() -> Parser:
    parser = Parser(
        prog="fd-fusion patch", description=__doc__.partition(": ")[2], epilog="Fusion itself needs no patch."
    )
    parser.add_argument("--tree", type=Path, metavar="FASTDEPLOY", help="the folder in which `fastdeploy` lies")
    parser.add_json()
    return parser


def _look_at(path: Path, tree: Path | None) -> dict[str, Any]:
    """Try the patch on the tree, forwards and backwards, and change nothing."""
    forwards = ["git", "-C", str(tree or "FASTDEPLOY"), "apply"]
    # Without a ceiling, git takes the paths of the patch from the root of a repository that lies above the tree.
    if tree and not (tree / ".git").exists():
        forwards = ["env", f"GIT_CEILING_DIRECTORIES={tree.resolve().parent}", *forwards]
    backwards = [*forwards, "-R"]
    state, command, detail = "unchecked", forwards, ""
    if tree:
        failure = _failure([*forwards, "--check", str(path)])
        if not failure:
            state = "applies"
        elif not _failure([*backwards, "--check", str(path)]):
            state, command = "applied", backwards
        else:
            state, command, detail = "differs", None, failure
    commit = re.match(r"fastdeploy-([0-9a-f]+)-", path.name)[1]
    command = command and shlex.join([*command, str(path)])
    return {"path": str(path), "commit": commit, "state": state, "detail": detail, "command": command}


def _failure(command: list[str]) -> str:
    """Return the first line of why a command failed; empty where it did not."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [*(done.stderr + done.stdout).splitlines(), f"exit code {done.returncode}"]
    return lines[0] if done.returncode else ""


def _for_people(one: dict[str, Any]) -> str:
    lines = [one["path"], f"    made for commit {one['commit']} of FastDeploy: {_SAYS[one['state']]}"]
    return "\n".join([*lines, f"    {one['command'] or one['detail']}"])
