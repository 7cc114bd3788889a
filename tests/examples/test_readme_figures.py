"""The documents' tables of figures are the ones that examples/results/readme_tables.py prints from the JSON files."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("readme_tables", ROOT / "examples/results/readme_tables.py")
readme_tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(readme_tables)
WHERE = {
    "README.md": readme_tables.README,
    "README.zh.md": readme_tables.README,
    "examples/results/README.md": readme_tables.TABLES,
}


@pytest.mark.parametrize("name", WHERE)
def test_figures_come_from_the_results(name):
    text = (ROOT / name).read_text()
    found = dict(re.findall(r"<!-- figures: ([\w-]+) -->\n(.*?)\n<!-- figures: end -->", text, re.S))
    assert found == {key: "\n".join(table()) for key, table in WHERE[name].items()}


def test_the_readme_shows_losses():
    """Those of a residual that is sent back; where it stays there is none in these cells."""
    rows = [[float(cell) for cell in row.split("|")[1:-1]] for row in readme_tables.gains()[2:]]
    assert len(rows) == 8 and any(back > min(others) for _, _, _, back, *others, _ in rows)
    assert all(ours <= back for _, _, ours, back, *_ in rows)


def test_every_result_is_listed():
    folder, text = ROOT / "examples/results", (ROOT / "examples/results/README.md").read_text()
    assert not [path.name for path in folder.glob("*.json") if f"`{path.name}`" not in text]
    assert not [name for name in re.findall(r"`([\w.]+\.(?:json|txt))`", text) if not (folder / name).exists()]
