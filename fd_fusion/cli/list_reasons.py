"""`python -m fd_fusion reasons [CODE]`: every reason why something is off, and what to do about it."""

from __future__ import annotations

import difflib
import re

from fd_fusion.cli.messages import Parser, say, to_json
from fd_fusion.reasons import TABLE


def main(argv: list[str]) -> int:
    """Print the reason of a code, or all. Exit code 2: there is no such code."""
    parser = Parser(prog="fd-fusion reasons", description=__doc__.partition(": ")[2])
    parser.add_argument("code", nargs="?", metavar="CODE", help="one reason, by its code (default: all)")
    parser.add_json()
    args = parser.parse_args(argv)
    code = args.code
    if code is not None and code not in TABLE:
        near = [one for one in TABLE if code in one] or difflib.get_close_matches(code, TABLE, 5)
        hint = f"near ones: {', '.join(near)}" if near else "`python -m fd_fusion reasons` lists all"
        return say(f"no reason has the code {code!r}; {hint}", 2)
    found = {
        one: {"sentence": _plain(TABLE[one].sentence), "remedy": _plain(TABLE[one].remedy)}
        for one in (TABLE if code is None else [code])
    }
    lines = [f"{one}\n    {entry['sentence']}\n    -> {entry['remedy']}" for one, entry in found.items()]
    print(to_json(found, 2) if args.json else "\n".join(lines))
    return 0


def _plain(sentence: str) -> str:
    """Leave the {facts} in braces; make doubled braces, which stand for themselves, single."""
    return re.sub(r"\{(\w+)![rs]\}", r"{\1}", sentence).replace("{{", "{").replace("}}", "}")
