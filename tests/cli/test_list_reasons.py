"""fd_fusion/cli/README.md holds the package's own table of reasons, as `fd_fusion reasons --write` gives it."""

from pathlib import Path

from fd_fusion.cli import list_reasons as reasons
from fd_fusion.reasons import TABLE

ROOT = Path(__file__).parents[2]


def test_the_document_holds_every_reason():
    text = (ROOT / "fd_fusion/cli/README.md").read_text(encoding="utf-8")
    told = reasons.BEGIN + text.partition(reasons.BEGIN)[2].partition(reasons.END)[0] + reasons.END
    assert told == reasons.markdown(), "run: python -m fd_fusion reasons --write fd_fusion/cli/README.md"


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
