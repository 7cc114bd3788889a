"""Reading a host's `forward`, so that nothing of it need be copied or replaced.

A mixture-of-experts block may reduce through a function that its module imported by name. That call cannot be
patched away for one block alone; but it stands under an `if` on an attribute of the block, and an attribute of one
instance can be set. Whether it may be set is read from the source: the `if` must be the last thing before the
result is returned, hold nothing but the reduction, and the attribute must have no other reader. Any other shape of
source is unknown, and an unknown block keeps its own reduction.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable

REDUCE = "tensor_model_parallel_all_reduce"
_EXPERT_PARALLEL = {"ep_size", "use_ep", "expert_parallel_size"}


def read_block(forward: Callable | ast.FunctionDef) -> str | None:
    """Read the forward of a block whose result is a sum of its parts. Returns the attribute under which it reduces,
    "" where it has no reduction of its own; None means: of a shape that is not known.

    Without a reduction of its own a block must be a sum of its parts: assignments of calls and sums, `if`s on
    attributes, one return of a name, a sum or a call. With one, under an `if` right before the only return, what the
    host would reduce there is the partial sum, whatever it was made of. A reduction under an `if` on expert
    parallelism does not count: that is excluded before this is asked.
    A condition may be given a name first: `if self.flag: skip = ...; if not skip: reduce`.
    """
    function = parse(forward)
    if function is None:
        return None
    body = function.body if ast.get_docstring(function) is None else function.body[1:]
    if not body or not isinstance(body[-1], ast.Return):
        return None
    live = [node for node in body if _holds_reduction(node) and not _is_under(node, _EXPERT_PARALLEL)]
    if not live:
        return "" if all(_is_known(node) for node in body) else None
    returns = any(isinstance(part, ast.Return) for node in body[:-2] for part in ast.walk(node))
    if len(live) > 1 or len(body) < 2 or live[0] is not body[-2] or returns:
        return None
    flag = _flag_of(live[0], body[-1])
    return flag if _times_read(function, flag) == 1 else None


def parse(forward: Callable | ast.FunctionDef) -> ast.FunctionDef | None:
    if isinstance(forward, ast.FunctionDef):
        return forward
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return None  # built in an interpreter, or compiled: there is no source to read
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


def _is_known(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return len(node.targets) == 1 and isinstance(node.targets[0], ast.Name) and _is_sum(node.value)
    if isinstance(node, ast.If):
        return all(map(_is_known, node.body + node.orelse))
    return isinstance(node, ast.Return) and node.value is not None and _is_sum(node.value)


def _is_sum(node: ast.expr) -> bool:
    """Return whether this is a name, a call of a layer of self or of the reduction, or a sum of these: linear."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and _is_sum(node.left) and _is_sum(node.right)
    if isinstance(node, ast.Call):
        return _is_reduction(node) or attribute_of(node.func) is not None
    return isinstance(node, ast.Name)


def _is_reduction(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == REDUCE


def _holds_reduction(node: ast.AST) -> bool:
    return any(map(_is_reduction, ast.walk(node)))


def _is_under(node: ast.stmt, attributes: set[str]) -> bool:
    return isinstance(node, ast.If) and any(
        isinstance(part, ast.Attribute) and part.attr in attributes for part in ast.walk(node.test)
    )


def _flag_of(node: ast.stmt, returned: ast.Return) -> str | None:
    """Return the attribute of `if self.flag [> 1] [and ...]:` over nothing but reductions of what is returned."""
    if not isinstance(node, ast.If) or node.orelse or not isinstance(returned.value, ast.Name):
        return None
    if not _only_reduces(node.body, returned.value.id):
        return None
    is_all = isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
    for test in node.test.values if is_all else [node.test]:
        if isinstance(test, ast.Compare) and ast.unparse(test).endswith(" > 1"):
            test = test.left
        if attribute_of(test) is not None:
            return attribute_of(test)
    return None


def _only_reduces(body: list[ast.stmt], name: str) -> bool:
    """Return whether the body is `name = reduce(name)` and `return name` alone, under any further conditions.

    A condition may have been given a name of its own: no line behind this body reads it.
    """
    for node in body:
        if isinstance(node, ast.If):
            known = _only_reduces(node.body + node.orelse, name)
        elif isinstance(node, ast.Assign) and _is_condition(node.value):
            known = isinstance(node.targets[0], ast.Name) and node.targets[0].id != name and len(node.targets) == 1
        elif isinstance(node, ast.Assign):
            reduces = _is_reduction(node.value) and bool(node.value.args)
            known = reduces and ast.unparse(node.targets[0]) == ast.unparse(node.value.args[0]) == name
        else:
            known = isinstance(node, ast.Return) and ast.unparse(node.value) == name
        if not known:
            return False
    return True


def _is_condition(node: ast.expr) -> bool:
    return isinstance(node, (ast.BoolOp, ast.Compare, ast.UnaryOp)) and not any(
        isinstance(part, (ast.Call, ast.NamedExpr)) for part in ast.walk(node)
    )


def attribute_of(node: ast.AST) -> str | None:
    """Return "norm" of `self.norm`, "layers" of `self.layers[i]`; None of anything else."""
    node = node.value if isinstance(node, ast.Subscript) else node
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def _times_read(function: ast.FunctionDef, attribute: str | None) -> int:
    return sum(isinstance(node, ast.Attribute) and node.attr == attribute for node in ast.walk(function))
