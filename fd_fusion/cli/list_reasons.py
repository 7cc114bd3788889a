"""`python -m fd_fusion reasons [CODE]`: every reason why something is off, and what to do about it."""

from __future__ import annotations

import argparse
import difflib
import re
import sys

from fd_fusion.reasons import TABLE


def main(argv: list[str]) -> int:
    """Print the reason of a code, or all. Exit code 2: there is no such code."""
    parser = argparse.ArgumentParser(prog="fd-fusion reasons", description=__doc__.partition(": ")[2])
    parser.add_argument("code", nargs="?", metavar="CODE", help="one reason, by its code (default: all)")
    code = parser.parse_args(argv).code
    if code is not None and code not in TABLE:
        near = [one for one in TABLE if code in one] or difflib.get_close_matches(code, TABLE, 5)
        hint = f"near ones: {', '.join(near)}" if near else "`python -m fd_fusion reasons` lists all"
        print(f"fd_fusion: no reason has the code {code!r}; {hint}", file=sys.stderr)
        return 2
    for one in TABLE if code is None else [code]:
        print(f"{one}\n    {_plain(TABLE[one].sentence)}\n    -> {_plain(TABLE[one].remedy)}")
    return 0


def _plain(sentence: str) -> str:
    """The {facts} stay in braces; doubled braces, which stand for themselves, become single."""
    return re.sub(r"\{(\w+)![rs]\}", r"{\1}", sentence).replace("{{", "{").replace("}}", "}")
