"""README.md and README.zh.md say the same: the same commands and code, tables of the same shape and terms."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = (ROOT / "README.md").read_text(), (ROOT / "README.zh.md").read_text()


def blocks(text):
    return re.findall(r"^```.*?^```", text, re.M | re.S)


def rows(text):
    """The table rows as the code spans and numbers that stand in them: what no translation changes."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [(line.count("|"), tuple(sorted(re.findall(r"`[^`]+`|\d+(?:[.,]\d+)*", line)))) for line in lines]


def headings(text):
    return [
        line.split()[0]
        for line in re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).splitlines()
        if line[:1] == "#"
    ]


def test_commands_and_code_are_equal():
    assert blocks(ENGLISH) == blocks(CHINESE)


def test_tables_are_equal():
    assert rows(ENGLISH) == rows(CHINESE)


def test_structure_is_equal():
    assert headings(ENGLISH) == headings(CHINESE)


def test_ci_runs_commands_of_the_readme():
    commands = [block for block in blocks(ENGLISH) if block.startswith("```bash ci")]
    assert any("fd_fusion demo" in block for block in commands) and any("pytest" in block for block in commands)


def test_every_file_that_is_named_exists():
    for path in re.findall(r"`((?:fd_fusion|tests|examples|patches)/[\w./-]*)`", ENGLISH):
        assert (ROOT / path).exists(), path
