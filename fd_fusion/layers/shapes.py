"""Shapes as the layers' checks see them. While a graph is traced (AST), a size may be a value of the graph: no int.

Such a size is not known: it fits any other. A check that compared it would put the comparison into the graph.
"""

from __future__ import annotations

from typing import Any

import paddle


def cannot_fit(got: list[Any], expected: list[Any]) -> bool:
    """Return whether two shapes differ in what is known of them."""
    if paddle.in_dynamic_mode():
        return got != expected
    return len(got) != len(expected) or any(
        isinstance(one, int) and isinstance(other, int) and one != other for one, other in zip(got, expected)
    )


def known_sizes(shape: list[Any]) -> list[int | None]:
    """Return the shape for a message: None where a size is not known."""
    return [size if isinstance(size, int) else None for size in shape]
