"""The documents name what is there: links, files, commands and their options, reasons, metrics."""

import importlib
import re
from pathlib import Path

import pytest
from bench import command as bench

import fd_fusion
from fd_fusion.__main__ import COMMANDS
from fd_fusion.binding import metrics
from fd_fusion.reasons import TABLE

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "fd_fusion/**/*.md", "examples/**/*.md", "patches/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def code_of(name):
    """Every line of the code blocks, and every code span, which may go over the end of a line."""
    text = text_of(name)
    lines = [line for block in re.findall(r"^```.*?^```", text, re.M | re.S) for line in block.splitlines()]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [*lines, *(" ".join(span.split()) for span in spans)]


def anchors(path):
    """Of a document's headings, as the sites that show it make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_each_reader_has_a_document():
    rooms = ["fd_fusion/", *(f"fd_fusion/{room}/" for room in ("backends", "cli", "hosts/fastdeploy", "kernels"))]
    wanted = [f"{room}README.md" for room in ("", *rooms, "examples/", "examples/results/", "patches/", "tests/")]
    assert {*wanted, "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_resolves(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_exists(name):
    for path in re.findall(r"(?<![\w/.])(?:fd_fusion|tests|examples|patches|\.ci)/[\w./-]+", text_of(name)):
        assert (ROOT / path.rstrip(".-")).exists(), path


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_option_exists(name, capsys):
    """`python -m fd_fusion COMMAND --option`. What `serve` does not know is the api server's."""
    if (ROOT / name).with_suffix(".json").exists():
        pytest.skip("a table of a result tells the command of its own commit")
    code = "\n".join(code_of(name))
    for line in re.findall(r"python examples/bench (.+)", code):
        _all_options_exist(bench.main, line, 1, capsys)
    for line in re.findall(r"python -m fd_fusion (.+)", code):
        words = line.split()
        if words[0].startswith("-") or words[0] == "COMMAND":
            continue
        assert words[0] in COMMANDS, line
        if words[0] == "serve":
            continue
        _all_options_exist(importlib.import_module(COMMANDS[words[0]][0]).main, line, 0, capsys)


def _all_options_exist(main, line, commands, capsys):
    words = line.split()
    with pytest.raises(SystemExit) as caught:
        main([*words[:commands], "--help"])
    known, options = capsys.readouterr().out, [word for word in words if word.startswith("--")]
    assert caught.value.code == 0 and not [name for name in options if not re.search(rf"{name}(?![\w-])", known)], (
        line
    )


def test_the_reasons_of_the_fastdeploy_table_exist():
    _, _, rest = text_of("fd_fusion/hosts/fastdeploy/README.md").partition("| reason, by its code;")
    cells = [row.split("|")[2] for row in rest.partition("\n\n")[0].splitlines()[2:]]
    codes = re.findall(r"`(\w+)`", " ".join(cells))
    assert len(codes) > 10 and set(codes) <= set(TABLE)


def test_every_rule_is_named_where_strict_is_explained():
    text = text_of("fd_fusion/README.md").partition("Left out are only rules")[2]
    assert set(re.findall(r"`(\w+)`", text)) == {code for code, entry in TABLE.items() if entry.rule}


def test_every_metric_is_named():
    told = set(re.findall(r"`(fd_fusion_\w+?)(?:\{[\w,]+\})?`", text_of("fd_fusion/cli/README.md")))
    assert told == {*(f"fd_fusion_{name}_total" for name in metrics.COUNTERS), "fd_fusion_workspace_bytes"}


def test_the_changelog_begins_with_this_version():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == fd_fusion.__version__


def test_the_dockerfile_copies_what_is_there_and_installs_no_dependencies():
    text = (ROOT / "examples/Dockerfile").read_text()
    copied = [source for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for source in line.split()]
    assert copied and all((ROOT / source).exists() for source in copied)
    installs = re.findall(r"^[^#\n]*pip install.*$", text, re.M)
    assert installs and all("--no-deps" in line for line in installs)
    group, name = re.search(r"group='([\w.]+)'\)\['(\w+)'\]", text).groups()
    assert f'"{group}": ["{name} = ' in re.sub(r"\s+", " ", (ROOT / "setup.py").read_text()).replace("[ ", "[")
