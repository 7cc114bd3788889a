"""`python -m fd_fusion reasons [CODE]`."""

import pytest

from fd_fusion.cli import list_reasons as reasons
from fd_fusion.reasons import TABLE


def test_all_reasons(capsys):
    assert reasons.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(TABLE)
    assert len(lines) == 3 * len(TABLE) and "set FD_FUSION_CONFIG='{}'" in lines[2]


def test_one_reason(capsys):
    assert reasons.main(["one_rank"]) == 0
    assert capsys.readouterr().out == "one_rank\n    one rank: there is nothing to reduce\n    -> nothing to do\n"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("tow_streams", "no reason has the code 'tow_streams'; near ones: two_streams"),
        ("table", "near ones: table_unusable, table_stale, table_differs"),
        ("", "near ones: not_asked"),
        ("xyzzy#", "`python -m fd_fusion reasons` lists all"),
    ],
)
def test_an_unknown_code_gets_near_ones(code, says, capsys):
    assert reasons.main([code]) == 2
    out, err = capsys.readouterr()
    assert says in err and err.startswith("fd_fusion: ") and err.count("\n") == 1 and not out
