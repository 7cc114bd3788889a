"""The READMEs' tables of figures are the ones that examples/results/readme_tables.py prints from the JSON files."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("readme_tables", ROOT / "examples/results/readme_tables.py")
readme_tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(readme_tables)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_figures_come_from_the_results(name):
    text = (ROOT / name).read_text()
    found = dict(re.findall(r"<!-- figures: ([\w-]+) -->\n(.*?)\n<!-- figures: end -->", text, re.S))
    assert found == {key: "\n".join(table()) for key, table in readme_tables.TABLES.items()}


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_ratios_in_the_text_come_from_the_results(name):
    text = (ROOT / name).read_text()
    assert all(ratio in text for ratio in readme_tables.headline()), readme_tables.headline()
