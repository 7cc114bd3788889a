"""JSON that every reader takes. Python's own has NaN and Infinity, which JSON has not: they become null."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(data: Any, indent: int | None = None) -> str:
    """Return `data` as JSON text; a float that is no finite number is null."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
