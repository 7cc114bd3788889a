"""`python -m fd_fusion reasons`: every reason why something is off, and what to do about it."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from fd_fusion.reasons import TABLE

BEGIN, END = "<!-- reasons: begin -->", "<!-- reasons: end -->"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fd-fusion reasons", description=__doc__.partition(": ")[2])
    parser.add_argument("--markdown", action="store_true", help="as the table of the README")
    parser.add_argument("--write", nargs="+", type=Path, metavar="FILE", help="put the table between its marks")
    args = parser.parse_args(argv)
    if args.write:
        try:
            return max(map(_write, args.write))
        except (OSError, UnicodeDecodeError) as error:
            print(f"fd_fusion reasons: {error}", file=sys.stderr)
            return 1
    print(markdown() if args.markdown else text())
    return 0


def _write(path: Path) -> int:
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        print(f"fd_fusion reasons: {path} has no lines {BEGIN} and {END}", file=sys.stderr)
        return 1
    path.write_text(before + markdown() + after, encoding="utf-8")
    return 0


def markdown() -> str:
    """The troubleshooting table of the README, between its marks."""
    rows = [f"| `{code}` | {_cell(entry.sentence)} | {_cell(entry.remedy)} |" for code, entry in TABLE.items()]
    return "\n".join([BEGIN, "| code | you read | what to do |", "|---|---|---|", *rows, END])


def text() -> str:
    return "\n".join(
        f"{code}\n    {_plain(entry.sentence)}\n    -> {_plain(entry.remedy)}" for code, entry in TABLE.items()
    )


def _cell(sentence: str) -> str:
    return _plain(sentence).replace("|", "\\|").replace("<", "&lt;")


def _plain(sentence: str) -> str:
    """The {facts} stay in braces; doubled braces, which stand for themselves, become single."""
    return re.sub(r"\{(\w+)![rs]\}", r"{\1}", sentence).replace("{{", "{").replace("}}", "}")
