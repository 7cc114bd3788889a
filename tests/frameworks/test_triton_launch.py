"""A kernel under the interpreter: the functions that it calls become plain ones, whatever their names and modules."""

import importlib
import sys
import types

import numpy as np

from fd_fusion.frameworks.triton_launch import interpreting, load_kernel, prepare

SOURCES = {  # of modules beside the package's own: Triton reads the source of a function from its file
    "steps": "@triton.jit\ndef add_one(x):\n    return x + 1\n",
    "adding": "from fd_fusion.kernels.made_up.steps import add_one\n\n\n"
    "@triton.jit\ndef add_two(x):\n    return add_one(add_one(x))\n\n\n"
    '@triton.jit(do_not_specialize=["address"])\ndef store_five(address):\n'
    "    tl.store(address.to(tl.pointer_type(tl.int64)), add_two(THREE))\n",
}


def test_every_function_but_the_kernel_is_plain(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("")
    for name, source in SOURCES.items():
        head = "import triton\nimport triton.language as tl\n\nTHREE = tl.constexpr(3)\n\n\n"
        (tmp_path / f"{name}.py").write_text(head + source)
    package = types.ModuleType("fd_fusion.kernels.made_up")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    with interpreting("cpu"):
        kernel = load_kernel("made_up.adding", "store_five")
        launch = prepare(kernel, (1 << 40,), {}, "cpu").launch
        adding = importlib.import_module("fd_fusion.kernels.made_up.adding")
        steps = importlib.import_module("fd_fusion.kernels.made_up.steps")
        assert adding.store_five is kernel and type(kernel).__name__ == "InterpretedFunction"
        plain = (adding.add_two, adding.add_one, steps.add_one)
        assert all(isinstance(function, types.FunctionType) for function in plain), plain
        number = np.zeros(1, np.int64)
        launch(1, number.ctypes.data)
        assert load_kernel("made_up.adding", "store_five") is kernel
    assert number[0] == 5
    for name in SOURCES:
        sys.modules.pop(f"fd_fusion.kernels.made_up.{name}", None)


def test_the_functions_of_the_all_reduce_kernel():
    with interpreting("cpu"):
        kernel = load_kernel("all_reduce.kernel", "all_reduce_rms_norm")
    modules = [module for name, module in sys.modules.items() if name.startswith("fd_fusion.kernels.all_reduce.")]
    slow = {value for module in modules for value in vars(module).values() if type(value) is type(kernel)}
    store_word = getattr(sys.modules.get("fd_fusion.kernels.all_reduce.probe"), "store_word", kernel)
    assert slow <= {kernel, store_word}
