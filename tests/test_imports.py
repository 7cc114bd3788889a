"""What importing loads, and who may import whom (design: one direction, no level imports itself)."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fd_fusion

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fd_fusion"
LEVELS = [
    {"__init__", "reasons", "reference"},
    {"config", "exact", "site"},
    {"spec"},
    {"comm", "kernels", "tuning"},
    {"frameworks"},
    {"backends"},
    {"layers"},
    {"binding"},
    {"hosts"},
    {"cli"},
    {"__main__"},
]
# A package is one level; inside it modules may build on one another, never in a circle.
PACKAGES = {"backends", "binding", "cli", "comm", "frameworks", "hosts", "kernels", "layers", "tuning"}
FRAMEWORKS = {"paddle", "torch", "triton", "flashinfer", "fastdeploy", "tvm_ffi"}
MAY = {  # which framework may stand where; "lazy" is inside a function
    "paddle": {"backends", "binding", "cli", "frameworks", "hosts", "layers"},
    "triton": {"backends", "frameworks", "kernels"},
    "flashinfer": {"backends"},
    "tvm_ffi": {"backends"},
    "torch": {"backends", "cli", "frameworks"},
    "fastdeploy": {"cli", "hosts"},
}


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_loads_no_framework():
    got = run(
        "import sys; import fd_fusion, fd_fusion.config, fd_fusion.site, fd_fusion.reasons, fd_fusion.comm.group; "
        "import fd_fusion.layers; dir(fd_fusion), dir(fd_fusion.layers); "
        "fd_fusion.FusionConfig; print([m for m in sys.modules if m.split('.')[0] in "
        f"{sorted(FRAMEWORKS)!r}])"
    )
    assert got == "[]"


def test_the_layers_do_not_touch_the_torch_proxy_nor_load_other_frameworks():
    got = run(
        "import sys, paddle; before = list(sys.meta_path); had = set(sys.modules); "
        "import fd_fusion.hosts.own_layers, fd_fusion.layers.qk_rms_norm; "
        "new = {m.split('.')[0] for m in set(sys.modules) - had}; "
        f"print(sys.meta_path == before, sorted(new & {FRAMEWORKS - {'paddle'}!r}))"
    )
    assert got == "True []"


def test_public_names_resolve_and_those_of_a_subpackage():
    missing, same = run(
        "import fd_fusion; print([n for n in fd_fusion.__all__ if getattr(fd_fusion, n) is None]); "
        "from fd_fusion.layers import *; print(RMSNorm is fd_fusion.RMSNorm, QKRMSNorm.__name__)"
    ).splitlines()
    assert (missing, same) == ("[]", "True QKRMSNorm")
    with pytest.raises(ImportError, match="no_such"):
        from fd_fusion.layers import no_such  # noqa: F401


@pytest.mark.parametrize("package", ["fd_fusion", "fd_fusion.layers"])
def test_the_lazy_names_are_known_before_they_are_used(package):
    """To dir(), to `from ... import *`, and to editors and type checkers, which read and do not run."""
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    source = ast.parse(Path(module.__file__).read_text())
    read = [name for node in source.body if _for_type_checkers(node) for name in _names(node)]
    assert sorted(read) == sorted(set(module.__all__) - {"__version__"}) == sorted(module._HOME)
    (listed,) = (node.value for node in source.body if isinstance(node, ast.Assign) and _target(node) == "__all__")
    assert ast.literal_eval(listed) == module.__all__, "a list that can be read without running"


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _names(block: ast.If):
    """Names that a block imports for others to use: `from x import y as y`."""
    return [alias.asname for node in block.body for alias in node.names if alias.asname == alias.name]


def _target(node: ast.Assign) -> str:
    return getattr(node.targets[0], "id", "")


def _unit(module: str) -> str:
    """The part that a module or a public name belongs to: "comm" for fd_fusion.comm.group, "hosts" for `bind`."""
    name = module.split(".")[1] if "." in module else "__init__"
    return fd_fusion._HOME.get(name, name).split(".")[0]


def _imports(path: Path):
    """(imported dotted name, inside a function?) of every import of a file."""
    tree = ast.parse(path.read_text())
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    unread = {id(n) for block in ast.walk(tree) if _for_type_checkers(block) for n in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if node.module.split(".")[0] == "fd_fusion" and (ROOT / node.module.replace(".", "/")).is_dir():
                yield from ((f"{node.module}.{alias.name}", id(node) in inside) for alias in node.names)
            else:
                yield node.module, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: relative import")


def _module(path: Path) -> str:
    """fd_fusion.comm.group of its file; the package's own name of an __init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _private_uses(path: Path):
    """Each private name of another module of ours that a file takes, or reaches for: "module: other._name"."""
    tree, modules = ast.parse(path.read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fd_fusion":
            for alias in node.names:
                if alias.name.startswith("_") and not alias.name.startswith("__"):
                    yield f"{_module(path)}: {node.module}.{alias.name}"
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id in modules and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield f"{_module(path)}: {modules[node.value.id]}.{node.attr}"


FILES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_direction(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    unit = parts[0]
    level = next(i for i, units in enumerate(LEVELS) if unit in units)
    for name, lazy in _imports(path):
        top = name.split(".")[0]
        if top == "fd_fusion":
            other = _unit(name)
            if other == "__version__" or (other == unit and unit in PACKAGES):
                continue
            below = next(i for i, units in enumerate(LEVELS) if other in units)
            assert below < level, f"{path.name} ({unit}) imports {name}"
        elif top in FRAMEWORKS:
            assert unit in MAY[top], f"{path.name} ({unit}) imports {name}"
            if unit in ("frameworks", "cli") or parts[:2] == ("backends", "flashinfer"):
                may = unit == "cli" or path.name in ("paddle_ops.py", "paddle_fp8.py")
                assert lazy or may, f"{path.name} imports {name} at its top"


def test_no_module_uses_a_private_name_of_another():
    files = [*FILES, *ROOT.glob("examples/**/*.py")]
    assert {use for path in files for use in _private_uses(path)} == set()


def test_no_circles_inside_a_package():
    graph = {}
    for path in FILES:
        module = _module(path)
        graph[module] = {name for name, lazy in _imports(path) if name.startswith("fd_fusion.") and not lazy}
    done, stack = set(), []

    def visit(module):
        assert module not in stack, f"circle: {[*stack, module]}"
        if module in done or module not in graph:
            return
        stack.append(module)
        for other in graph[module]:
            visit(other)
        done.add(stack.pop())

    for module in graph:
        visit(module)
