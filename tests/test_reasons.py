"""The table of reasons: complete sentences, remedies, and no reason that cannot be made."""

import re
import string
from pathlib import Path

import pytest
from support.flashinfer_releases import RELEASES

from fd_fusion.reasons import TABLE, FusionError, Reason, because, refused_by

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


@pytest.mark.parametrize("code", TABLE)
def test_a_remedy_says_what_to_do(code):
    """And sends nobody to look for it elsewhere."""
    assert "README" not in TABLE[code].remedy and "mend" not in TABLE[code].remedy


def test_the_versions_of_flashinfer_that_remedies_name_are_known():
    listed = re.search(r"FlashInfer (.*), compile", TABLE["flashinfer_build"].remedy)[1]
    named = set(re.split(", | or ", listed))
    assert len(named) == 3 and named <= {release.version for release in RELEASES}


def test_unknown_codes_and_missing_facts_are_our_mistakes():
    with pytest.raises(AssertionError):
        because("no_such_reason")
    with pytest.raises(AssertionError, match="rows"):
        because("too_many_rows", rows=3)


def test_every_reason_is_used_and_every_used_one_exists():
    text = "\n".join(path.read_text() for path in SOURCES)
    used = set(re.findall(r'because\(\s*"(\w+)"', text))
    assert used <= set(TABLE), used - set(TABLE)
    named = {code for code in TABLE if f'"{code}"' in text}
    assert named == set(TABLE), f"never used: {sorted(set(TABLE) - named)}"


def test_a_reason_of_another_version_is_kept_as_it_was_told():
    """An unknown code, or a known one with other facts: it became "there is no store to vote over"."""
    for told in (
        {"code": "new_in_2", "facts": {"x": 1}, "text": "the new thing is off", "remedy": "turn it on"},
        {"code": "too_many_rows", "facts": {"rows": 1}, "text": "T=1 is too many", "remedy": "fewer"},
    ):
        reason = Reason.from_dict(told)
        assert reason.to_dict() == told and (str(reason), reason.remedy) == (told["text"], told["remedy"])
        assert Reason.from_dict(refused_by(1, reason).to_dict()).cause == reason
    for broken in (None, 3, {}, {"code": "x", "facts": {}}, {"code": [], "facts": {}, "text": "", "remedy": ""}):
        with pytest.raises(ValueError, match="not a reason"):
            Reason.from_dict(broken)


def test_a_refusal_hands_on_what_was_refused():
    cause = because("hidden_size", got=30, need="a multiple of 8")
    reason = refused_by(2, refused_by(1, cause).cause)
    assert str(reason) == f"rank 2 refused: {cause}" and reason.remedy == f"on rank 2: {cause.remedy}"
    assert reason.root == cause and reason.to_dict()["cause"] == cause.to_dict()
    assert Reason.from_dict(reason.to_dict()) == reason
    assert cause.remedy in str(FusionError(reason))
