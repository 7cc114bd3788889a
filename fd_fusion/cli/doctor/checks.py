"""The results of the checks of `doctor`: one sentence each, with what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from fd_fusion.reasons import Reason

# What a result means for the verdict, and how a report shows it. "off": fusion cannot run because of it. "broken":
# nothing can be trusted.
STATES = {"ok": "ok  ", "note": "-   ", "warn": "WARN", "off": "OFF ", "broken": "BAD "}


@dataclass(frozen=True)
class CheckResult:
    """`topic` and `name` are stable, for programs; `text` is for people; `data` is plain."""

    topic: str
    name: str
    state: str
    text: str
    remedy: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.state in STATES, self.state


def result(name: str, state: str, text: str, remedy: str = "", /, **data: Any) -> CheckResult:
    """Make a result of a check. `run_checks` knows its topic."""
    return CheckResult("", name, state, text, remedy, data)


def of_reason(name: str, state: str, reason: Reason, /, **data: Any) -> CheckResult:
    """Make a result of a reason of the package."""
    return result(name, state, str(reason), reason.remedy, code=reason.code, **data)


def run_checks(topic: str, probe: Callable[[], Iterable[CheckResult]], state: str = "warn") -> list[CheckResult]:
    """Run the checks of `probe`. A probe that fails is a result too, of this state: the others still run."""
    found: list[CheckResult] = []
    try:
        found.extend(probe())
    except Exception as error:  # becomes a sentence of the report
        text = f"{topic} could not be checked: {type(error).__name__}: {error}"
        remedy = "fix what the sentence names" if state == "broken" else ""
        found.append(result(probe.__name__.strip("_<>"), state, text, remedy))
    return [replace(one, topic=one.topic or topic) for one in found]
