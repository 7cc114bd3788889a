"""Reading a host's `forward`: who reads what passes between its layers."""

from __future__ import annotations

import ast
from collections.abc import Callable

from fd_fusion.hosts.fastdeploy.source import attribute_of, parse


def reads_between_layers(forward: Callable | ast.FunctionDef) -> str | None:
    """The line on which a model reads what passes between its layers other than in a layer or its last norm.

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
    """The loop `for ...: h, r = layer(..., h, r)`, what it passes on, and the names that stand for a layer in it.

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


def _is_layer(node: ast.expr, names: set[str]) -> bool:
    return attribute_of(node) == "layers" or (isinstance(node, ast.Name) and node.id in names)


def _call_of(node: ast.AST) -> ast.Call | None:
    """The call whose result, or an item of it, `node` assigns."""
    value = node.value if isinstance(node, ast.Assign) else None
    value = value.value if isinstance(value, ast.Subscript) else value
    return value if isinstance(value, ast.Call) else None


def _targets(node: ast.Assign) -> set[str]:
    return {name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}


def _statement_of(function: ast.FunctionDef, target: ast.AST) -> ast.stmt:
    """The innermost statement that holds `target`."""
    return [n for n in ast.walk(function) if isinstance(n, ast.stmt) and target in ast.walk(n)][-1]
