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
    state, detail = "unchecked", ""
    if tree is not None:
        failure = _failure(tree, path, back=False)
        state = "applies" if not failure else "differs" if _failure(tree, path, back=True) else "applied"
        detail = failure if state == "differs" else ""
    command = (
        _command(tree, path, back=state == "applied") if tree else ["git", "-C", "FASTDEPLOY", "apply", str(path)]
    )
    return {
        "path": str(path),
        "commit": re.match(r"fastdeploy-([0-9a-f]+)-", path.name)[1],
        "state": state,
        "detail": detail,
        "command": None if state == "differs" else shlex.join(command),
    }


def _command(tree: Path, path: Path, *, back: bool, check: bool = False) -> list[str]:
    # Without a ceiling, git takes the paths of the patch from the root of a repository that lies above the tree.
    above = [] if (tree / ".git").exists() else ["env", f"GIT_CEILING_DIRECTORIES={tree.resolve().parent}"]
    return [*above, "git", "-C", str(tree), "apply", *["--check"] * check, *["-R"] * back, str(path)]


def _failure(tree: Path, path: Path, *, back: bool) -> str:
    """Return the first line of why the patch does not apply; empty where it does."""
    done = subprocess.run(_command(tree, path, back=back, check=True), capture_output=True, text=True)
    lines = [*(done.stderr + done.stdout).splitlines(), f"exit code {done.returncode}"]
    return lines[0] if done.returncode else ""


def _for_people(one: dict[str, Any]) -> str:
    lines = [one["path"], f"    made for commit {one['commit']} of FastDeploy: {_SAYS[one['state']]}"]
    return "\n".join([*lines, f"    {one['command'] or one['detail']}"])
