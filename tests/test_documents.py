"""The small documents name what is there."""

import re
from pathlib import Path

import fd_fusion

ROOT = Path(__file__).parents[1]


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
