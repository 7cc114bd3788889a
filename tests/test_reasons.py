"""The table of reasons: complete sentences, remedies, and no reason that cannot be made."""

import re
import string
from pathlib import Path

import pytest

from fd_fusion.reasons import TABLE, FusionError, Reason, because

SOURCES = sorted((Path(__file__).parents[1] / "fd_fusion").rglob("*.py"))


def _sample(code):
    entry = TABLE[code]
    names = {n for text in (entry.sentence, entry.remedy) for _, n, _, _ in string.Formatter().parse(text) if n}
    return because(code, **dict.fromkeys(names, 3))


@pytest.mark.parametrize("code", TABLE)
def test_every_reason_is_a_sentence_with_a_remedy(code):
    reason = _sample(code)
    assert str(reason) and reason.remedy and "{" not in str(reason).replace("{}", "")
    assert Reason.from_dict(reason.to_dict()) == reason
    assert str(FusionError(reason)).startswith("fd_fusion: ") and str(FusionError(reason)).endswith(".")


def test_unknown_codes_and_missing_facts_are_our_mistakes():
    with pytest.raises(AssertionError):
        because("no_such_reason")
    with pytest.raises(AssertionError, match="rows"):
        because("too_many_rows", rows=3)


def test_every_reason_is_used_and_every_used_one_exists():
    text = "\n".join(path.read_text() for path in SOURCES)
    used = set(re.findall(r'because\(\s*"(\w+)"', text))
    assert used <= set(TABLE), used - set(TABLE)
    named = {code for code in TABLE if re.search(rf'"{code}"', text.replace(f'"{code}": Entry', ""))}
    assert named == set(TABLE), f"never used: {sorted(set(TABLE) - named)}"
