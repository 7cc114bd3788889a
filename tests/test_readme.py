"""README.md and README.zh.md say the same, and commands, config, reasons and example are those of the code."""

import dataclasses
import json
import re
from pathlib import Path

from fd_fusion.config import FusionConfig
from fd_fusion.reasons import TABLE

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


def cells(first):
    """The rows of the English table whose head begins with `first`, each as a list of cells."""
    table = ENGLISH.partition(f"\n| {first} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]


def test_commands_and_code_are_equal():
    assert blocks(ENGLISH) == blocks(CHINESE)


def test_tables_are_equal():
    assert rows(ENGLISH) == rows(CHINESE)


def test_structure_is_equal():
    assert headings(ENGLISH) == headings(CHINESE)


def test_links_are_equal():
    links = [re.findall(r"\]\((?!README)([^)]+)\)", text) for text in (ENGLISH, CHINESE)]
    assert sorted(links[0]) == sorted(links[1]) and links[0]


def test_the_length_is_that_of_a_page_that_is_read():
    assert all(170 <= text.count("\n") <= 195 for text in (ENGLISH, CHINESE))


def test_ci_runs_commands_of_the_readme():
    """As .ci/run finds them: all commands of `bash ci` blocks, in order, the first of which installs."""
    found = re.findall(r"^```bash ci\n(.*?)^```", ENGLISH, re.M | re.S)
    commands = [line for block in found for line in block.splitlines()]
    assert commands[0].startswith("pip install -e")
    for wanted in ("demo --backend triton", "doctor", "pytest -n 2 --cov", "tests/dist/ops.py", "two_ranks.py"):
        assert any(wanted in command for command in commands), wanted


def test_the_python_of_the_readme_is_the_example():
    """Line by line and in order; `...` leaves lines out. CI runs the example."""
    source = iter((ROOT / "examples/two_ranks.py").read_text().splitlines())
    code = [block for block in blocks(ENGLISH) if block.startswith("```python")]
    assert len(code) == 1
    for line in code[0].splitlines()[1:-1]:
        assert line == "..." or line in source, line


def test_the_config_table_is_the_config():
    expected = [(f"`{field.name}`", f"`{json.dumps(field.default)}`") for field in dataclasses.fields(FusionConfig)]
    assert [(row[0], row[1]) for row in cells("key")] == expected


def test_the_reasons_that_are_named_exist():
    codes = [row[0].strip("`") for row in cells("code")]
    assert len(codes) == 6 and set(codes) <= set(TABLE)
