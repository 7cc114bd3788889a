"""A kernel under the interpreter: the functions that it calls become plain ones, whatever their names and modules.
And how a compiled one is launched."""

import importlib
import sys
import types
from unittest import mock

import numpy as np
import pytest

from fd_fusion.frameworks import triton_launch
from fd_fusion.frameworks.triton_launch import interpreting, launcher, load_kernel, prepare

SOURCES = {  # of modules beside the package's own: Triton reads the source of a function from its file
    "steps": "@triton.jit\ndef add_one(x):\n    return x + 1\n",
    "adding": "from fd_fusion.kernels.made_up.steps import add_one\n\n\n"
    "@triton.jit\ndef add_two(x):\n    return add_one(add_one(x))\n\n\n"
    '@triton.jit(do_not_specialize=["address"])\ndef store_five(address):\n'
    "    tl.store(address.to(tl.pointer_type(tl.int64)), add_two(THREE))\n",
    "reducing": '@triton.jit(do_not_specialize=["address"])\ndef store_largest(address):\n'
    "    numbers = tl.arange(0, 4) + tl.zeros((4,), tl.int32) + tl.zeros((4,), tl.int32)\n"
    "    to = address.to(tl.pointer_type(tl.int64)) + tl.program_id(0)\n"
    "    tl.store(to, tl.max(numbers, axis=0) + tl.min(numbers + 3, axis=0))\n",
}


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """The package fd_fusion.kernels.made_up, of the sources above."""
    (tmp_path / "__init__.py").write_text("")
    for name, source in SOURCES.items():
        head = "import triton\nimport triton.language as tl\n\nTHREE = tl.constexpr(3)\n\n\n"
        (tmp_path / f"{name}.py").write_text(head + source)
    package = types.ModuleType("fd_fusion.kernels.made_up")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    yield
    for name in SOURCES:
        sys.modules.pop(f"fd_fusion.kernels.made_up.{name}", None)


def test_every_function_but_the_kernel_is_plain(made_up):
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


def test_a_launch_patches_the_language_once_for_its_kernel_and_once_for_tritons_own_functions(made_up):
    with interpreting("cpu"):
        launch = prepare(load_kernel("made_up.reducing", "store_largest"), (1 << 40,), {}, "cpu").launch
        interpreter, number = importlib.import_module("triton.runtime.interpreter"), np.zeros(2, np.int64)
        for _ in range(2):
            with mock.patch.object(interpreter, "_patch_lang", wraps=interpreter._patch_lang) as patch:
                launch(2, number.ctypes.data)
                assert interpreter._patch_lang is patch, "it is put back"
            assert [call.args[0].__name__ for call in patch.mock_calls] == ["store_largest", "zeros"]
    assert number.tolist() == [6, 6]


def test_the_functions_of_the_all_reduce_kernel():
    with interpreting("cpu"):
        kernel = load_kernel("all_reduce.kernel", "all_reduce_rms_norm")
    modules = [module for name, module in sys.modules.items() if name.startswith("fd_fusion.kernels.all_reduce.")]
    slow = {value for module in modules for value in vars(module).values() if type(value) is type(kernel)}
    store_word = getattr(sys.modules.get("fd_fusion.kernels.all_reduce.probe"), "store_word", kernel)
    assert slow <= {kernel, store_word}


def test_triton_3_3_gets_its_own_driver_back(monkeypatch):
    """Its driver is looked for when it is first used, and lies in another place than in later versions."""
    config = types.SimpleNamespace(active="not looked for")
    config.set_active = lambda driver: setattr(config, "active", driver)
    monkeypatch.setattr(importlib.import_module("triton.runtime.driver"), "driver", config)
    monkeypatch.setattr(triton_launch, "_paddle_driver", lambda: "ours")
    monkeypatch.setattr(triton_launch, "paddle_or_torch", lambda: types.SimpleNamespace(__name__="paddle"))
    with triton_launch.triton_driver():
        assert config.active == "ours"
    assert vars(config).keys() == {"active", "set_active"} and config.active == "not looked for"


LIKE, TAIL = (1 << 40, 2, 1e-5), (8, "bfloat16", True)


class Launcher:
    """Triton's Python round its C function, which notes what it gets; `form` is the version's way to call it."""

    def __init__(self, form, scratch=0):
        self.form, self.launched, self.calls = form, [], 0
        self.global_scratch_size, self.launch = scratch, lambda *given: self.launched.append(given)

    def __call__(self, x, y, z, stream, function, *rest):
        self.calls += 1
        self.launch(*self.form(x, y, z, stream, function, *rest))


FORMS = {
    "3.3": lambda x, y, z, stream, function, *rest: (x, y, z, stream, function, False, None, *rest),
    "3.6": lambda x, y, z, stream, function, *rest: (x, y, z, stream, function, False, True, None, None, *rest),
    "3.9": lambda *given: (*given[:5], False, True, *given[5:9], None, None, "kinds", b"OO", given[9:]),
    "one that counts": lambda x, y, z, stream, function, *rest: (x, y, z, stream, function, *rest, 7),
    "one with the stream behind": lambda x, y, z, stream, function, *rest: (x, y, z, function, stream, *rest),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scratch", [0, 128])
def test_the_c_function_gets_what_triton_would_give_it(form, scratch):
    """On the stream that is current at each launch; where this version's way is not known, or memory is to be made
    for each launch, by Triton's own Python."""
    run, streams = Launcher(FORMS[form], scratch), iter(range(70, 80))
    made = types.SimpleNamespace(run=run, function=5, packed_metadata=(4, 1, 0))
    launch = launcher(made, lambda: next(streams), LIKE, TAIL)
    assert not run.launched, "a kernel was launched to find out how"
    run.calls = 0
    for programs in (3, 9):
        launch(programs, 1 << 41, 6, 0.5)
    tail = (5, (4, 1, 0), None, None, None, 1 << 41, 6, 0.5, *TAIL)
    assert run.launched == [FORMS[form](3, 1, 1, 70, *tail), FORMS[form](9, 1, 1, 71, *tail)]
    assert run.calls == (0 if form[0] == "3" and not scratch else 2)


EQUALS = {
    "two addresses the other way round": lambda *given: (*given[:9], given[10], given[9], *given[11:]),
    "the grid from behind": lambda x, y, z, *rest: (z, y, x, *rest),
}


@pytest.mark.parametrize("form", EQUALS)
def test_equal_numbers_in_another_order_are_not_taken_for_the_same(form):
    run = Launcher(EQUALS[form])
    made = types.SimpleNamespace(run=run, function=5, packed_metadata=(4, 1, 0))
    launch = launcher(made, lambda: 70, (1 << 40, 1 << 40, 2), TAIL)
    launch(3, 1 << 41, 1 << 42, 6)
    tail = (70, 5, (4, 1, 0), None, None, None, 1 << 41, 1 << 42, 6, *TAIL)
    assert run.launched == [EQUALS[form](3, 1, 1, *tail)]


def test_an_instrumented_kernel_is_launched_by_tritons_python_alone():
    """GSan, of Triton 3.8 and 3.9, asks the driver about the stream of each launch, and counts launches."""
    run = Launcher(FORMS["3.9"])
    run.gsan_enabled = True
    made = types.SimpleNamespace(run=run, function=5, packed_metadata=(4, 1, 0))
    launch = launcher(made, lambda: 70, LIKE, TAIL)
    assert not run.calls
    launch(3, *LIKE)
    assert run.calls == 1 == len(run.launched)


def test_the_c_function_of_this_triton():
    """The installed version's class, without a GPU: its own way is known."""
    driver = importlib.import_module("triton.backends.nvidia.driver")
    run, got = object.__new__(driver.CudaLauncher), []
    sizes = "global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align", "num_ctas"
    for name in (*sizes, "gsan_enabled", "launch_cooperative_grid", "launch_pdl"):
        setattr(run, name, 0)
    run.arg_annotations = run.kernel_signature = None
    run.launch = lambda *given: got.append(given)
    made = types.SimpleNamespace(run=run, function=5, packed_metadata=(4, 1, 0))
    with mock.patch.object(importlib.import_module("triton.runtime.driver").driver, "_active", object(), create=True):
        launch = launcher(made, lambda: 70, LIKE, TAIL)
        launch(3, *LIKE)
        run(3, 1, 1, 70, 5, (4, 1, 0), None, None, None, *LIKE, *TAIL)
    assert len(got) == 2 and got[0] == got[1]
    calls = []
    sys.setprofile(lambda frame, event, arg: event == "call" and calls.append(frame.f_code.co_name))
    launch(3, *LIKE)
    sys.setprofile(None)
    assert "__call__" not in calls
