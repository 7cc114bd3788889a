"""Reading a host's `forward`: who reads a partial sum between the layer that gives it and the norm behind it."""

from __future__ import annotations

import ast
from collections.abc import Callable

from fd_fusion.hosts.fastdeploy.source import attribute_of, parse

_GIVE_SUMS = ("self_attn", "linear_attn", "mlp")  # of a decoder layer


def reads_between_layers(forward: Callable | ast.FunctionDef) -> str | None:
    """Return the line on which a model reads what passes between its layers, but in a layer or its last norm.

    Such a line would see a partial sum, even if it runs for some requests only. None: there is no such line, or the
    source is not of a shape that `layer_loop` knows, and then the proving pass has to find out.
    """
    function = parse(forward)
    found = layer_loop(function) if function else None
    if found is None:
        return None
    loop, passed_on, layer_names = found
    after = [n for n in ast.walk(function) if getattr(n, "lineno", 0) >= loop.lineno]
    arguments, normalised = set(), {}  # ids of nodes; name -> the line from which on it is the last norm's result
    for node in after:
        if isinstance(node, ast.Call) and (_is_layer(node.func, layer_names) or attribute_of(node.func) == "norm"):
            arguments |= {id(value) for value in [*node.args, *(keyword.value for keyword in node.keywords)]}
        if (call := _call_of(node)) and attribute_of(call.func) == "norm":
            normalised |= dict.fromkeys(_targets(node), node.end_lineno)
    for node in after:
        read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in passed_on
        if read and id(node) not in arguments and node.lineno <= normalised.get(node.id, node.lineno):
            return ast.unparse(_statement_of(function, node))
    return None


def layer_loop(function: ast.FunctionDef) -> tuple[ast.For, set[str], set[str]] | None:
    """Return the loop `for ...: h, r = layer(..., h, r)`, what it passes on, and the names of a layer in it.

    A layer is `self.layers[i]`, or a name that the loop takes from `self.layers`. None: there is no such loop.
    """
    for loop in (n for n in ast.walk(function) if isinstance(n, ast.For)):
        takes = [loop.target] if any(attribute_of(n) == "layers" for n in ast.walk(loop.iter)) else []
        takes += [n.targets[0] for n in loop.body if isinstance(n, ast.Assign) and attribute_of(n.value) == "layers"]
        names = {name.id for target in takes for name in ast.walk(target) if isinstance(name, ast.Name)}
        for node in loop.body:
            call = _call_of(node)
            if call and _is_layer(call.func, names) and len(_targets(node)) > 1:
                return loop, _targets(node), names
    return None


def reads_in_layer(forward: Callable | ast.FunctionDef) -> str | None:
    """Return the line on which a decoder layer reads what its attention or its MLP gives, but to name it, hand it to
    a norm and return it. MiniCPM4's multiplies it. None: no such line, or the layer calls them in an unknown way.
    """
    function = parse(forward)
    return _reader_in(function.body, set()) if function else None


def _reader_in(body: list[ast.stmt], sums: set[str]) -> str | None:
    """Return the first line that reads a sum. `sums`: the names that hold one, which are kept up to date."""
    for node in body:
        if isinstance(node, ast.If):
            if _reads_sum(node.test, sums, allowed=[]):
                return ast.unparse(node.test)
            otherwise = set(sums)
            if line := _reader_in(node.body, sums) or _reader_in(node.orelse, otherwise):
                return line
            sums |= otherwise
            continue
        value = getattr(node, "value", None) if isinstance(node, (ast.Assign, ast.Return)) else None
        changed = isinstance(node, ast.AugAssign) and ast.unparse(node.target) in sums
        if changed or _reads_sum(node, sums, [value, *(value.elts if isinstance(value, ast.Tuple) else [])]):
            return ast.unparse(node)
        if isinstance(node, ast.Assign):
            sums -= _targets(node)
            sums |= _targets(node) if _is_sum(value, sums) else set()
    return None


def _is_sum(node: ast.AST | None, sums: set[str]) -> bool:
    if isinstance(node, ast.Call):
        return attribute_of(node.func) in _GIVE_SUMS
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in sums


def _reads_sum(node: ast.AST, sums: set[str], allowed: list[ast.AST | None]) -> bool:
    """Return whether a sum stands in `node` other than in an argument of a norm, or as one of the `allowed`."""
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and "layernorm" in (attribute_of(n.func) or "")]
    free = [*allowed, *(part for call in calls for part in [*call.args, *(word.value for word in call.keywords)])]
    return any(_is_sum(n, sums) and not any(n is one for one in free) for n in ast.walk(node))


def _is_layer(node: ast.expr, names: set[str]) -> bool:
    return attribute_of(node) == "layers" or (isinstance(node, ast.Name) and node.id in names)


def _call_of(node: ast.AST) -> ast.Call | None:
    """Return the call whose result, or an item of it, `node` assigns."""
    value = node.value if isinstance(node, ast.Assign) else None
    value = value.value if isinstance(value, ast.Subscript) else value
    return value if isinstance(value, ast.Call) else None


def _targets(node: ast.Assign) -> set[str]:
    return {name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}


def _statement_of(function: ast.FunctionDef, target: ast.AST) -> ast.stmt:
    """Return the innermost statement that holds `target`."""
    return [n for n in ast.walk(function) if isinstance(n, ast.stmt) and target in ast.walk(n)][-1]
