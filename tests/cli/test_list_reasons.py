"""The READMEs' table of reasons is the package's own: written by `python -m fd_fusion reasons --write`."""

from pathlib import Path

import pytest

from fd_fusion.cli import list_reasons as reasons
from fd_fusion.reasons import TABLE

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_holds_every_reason(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    told = reasons.BEGIN + text.partition(reasons.BEGIN)[2].partition(reasons.END)[0] + reasons.END
    assert told == reasons.markdown(), "run: python -m fd_fusion reasons --write README.md README.zh.md"


def test_every_row_is_one_row():
    rows = reasons.markdown().splitlines()[3:-1]
    assert len(rows) == len(TABLE) and all(row.replace("\\|", "").count("|") == 4 for row in rows)


def test_the_command(capsys, tmp_path):
    assert reasons.main(["--markdown"]) == 0 and "| `one_rank` |" in capsys.readouterr().out
    assert reasons.main([]) == 0 and "one_rank\n    one rank: there is nothing to reduce\n" in capsys.readouterr().out
    (file := tmp_path / "x.md").write_text(f"before\n{reasons.BEGIN}\nold\n{reasons.END}\nafter\n")
    assert reasons.main(["--write", str(file)]) == 0
    assert file.read_text() == f"before\n{reasons.markdown()}\nafter\n"
    file.write_text("no marks")
    assert reasons.main(["--write", str(file)]) == 1 and "has no lines" in capsys.readouterr().err
