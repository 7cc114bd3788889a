"""The launch of Triton kernels: compiled on an NVIDIA GPU for Paddle or torch, or interpreted on CPU memory.

Triton finds devices and streams through torch. Where Paddle is the framework, Triton gets a driver object that
asks Paddle, for the time of compiling and loading alone: a loaded kernel is launched with its stream passed in,
so that the host's own use of Triton is not changed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fd_fusion.frameworks.tensors import paddle_or_torch
from fd_fusion.reasons import FusionError, because

_INTERPRET = "TRITON_INTERPRET"
_REGISTERS, _WARPS, _PROGRAMS = 65536, 48, 16  # of a multiprocessor: the least that any from sm_80 on holds


@contextlib.contextmanager
def interpreting(device: str) -> Iterator[None]:
    """Make Triton's decorators return interpreted functions inside this block when `device` is "cpu".

    Triton decides at decoration, and imports parts of itself at the first launch: both belong inside.
    """
    before = os.environ.get(_INTERPRET)
    os.environ[_INTERPRET] = "1" if device == "cpu" else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_INTERPRET]
        else:
            os.environ[_INTERPRET] = before


def require_mode(device: str) -> None:
    """Import Triton in the mode that `device` needs. Raises FusionError where it is missing, or was imported before
    in the other mode: Triton decorates its own functions at import too, once in a process.
    """
    try:
        standard = importlib.import_module("triton.language.standard")
    except ImportError as error:
        raise FusionError(because("no_triton", detail=str(error))) from error
    if (type(standard.sum).__name__ == "InterpretedFunction") != (device == "cpu"):
        raise FusionError(because("triton_mode", need=int(device == "cpu")))


@contextlib.contextmanager
def triton_driver() -> Iterator[None]:
    """Give Triton a driver that compiles and loads for the framework's current device, and put its own back after.

    The framework's driver stays where Triton could find none: Triton 3.8 and newer ask for a driver at every launch.
    """
    if paddle_or_torch().__name__ == "torch":
        yield  # Triton's own driver
        return
    from triton.runtime.driver import driver

    name = "_active" if hasattr(driver, "_active") else "active"  # of Triton 3.3
    before = getattr(driver, name)  # not reset_active(): without torch that raises "0 active drivers"
    driver.set_active(_paddle_driver())
    try:
        yield
    finally:
        if before is not None or not _torch_hides_the_gpu():
            setattr(driver, name, before)


def _torch_hides_the_gpu() -> bool:
    """Return whether a torch without GPUs is imported: Triton then finds "0 active drivers", beside Paddle too."""
    torch = sys.modules.get("torch")
    with contextlib.suppress(AttributeError):  # a stand-in for torch
        return torch is not None and not torch.cuda.is_available()
    return False


@functools.cache
def _paddle_driver() -> Any:
    import paddle

    return make_driver(
        paddle.cuda.current_device,
        paddle.cuda.set_device,
        paddle.cuda.get_device_capability,
        paddle._C._cuda_getCurrentRawStream,
    )


def make_driver(current_device: Callable, set_device: Callable, capability: Callable, raw_stream: Callable) -> Any:
    """Return Triton's CUDA driver object with a framework's four functions in the place of torch's."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class FrameworkDriver(CudaDriver):
        def __init__(self) -> None:  # in the place of CudaDriver's, which imports torch
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device, self.set_current_device = current_device, set_device
            self.get_device_capability, self.get_current_stream = capability, raw_stream

    return FrameworkDriver()


def load_kernel(module: str, name: str) -> Any:
    """Load the kernel `name` of `fd_fusion.kernels.<module>`, compiled or interpreted as `interpreting` asks.

    An interpreted function that calls another patches the whole Triton language again each time, which is most of
    its time. Only a kernel has to, so the functions that a kernel calls are replaced by plain ones.
    """
    kernel = getattr(importlib.import_module(f"fd_fusion.kernels.{module}"), name)
    if type(kernel).__name__ == "InterpretedFunction":
        _make_plain(kernel.fn.__globals__, kernel)
    return kernel


def _make_plain(names: dict[str, Any], kernel: Any) -> None:
    """Replace all interpreted functions of our kernels in a module's names, and in the modules that define them."""
    for name, value in list(names.items()):
        ours = type(value) is type(kernel) and value.fn.__module__.startswith("fd_fusion.kernels.")
        if ours and value is not kernel:
            names[name] = value.rewrite()
            _make_plain(value.fn.__globals__, kernel)


@dataclass(frozen=True)
class Loaded:
    """A kernel that is compiled and loaded: `launch(programs, *args)` runs it on the current stream.

    resident: how many programs a multiprocessor holds at once (1 under the interpreter).
    """

    launch: Callable[..., None]
    resident: int


def prepare(kernel: Any, like: tuple, constants: dict[str, Any], device: str) -> Loaded:
    """Compile and load a kernel.

    Args:
        like: arguments of the types that all calls will have. The kernel must not specialize on their values.
        constants: its constexpr arguments, which come last, and launch options.

    A launch goes to the loaded function at once: looking the kernel up by its arguments, as `kernel[grid](...)` does,
    takes most of the host time of a launch.
    """
    if device == "cpu":
        return Loaded(functools.partial(_interpret, kernel, constants), 1)
    with triton_driver():
        made = kernel.warmup(*like, grid=(1,), **constants)
        made._init_handles()
    framework = paddle_or_torch()
    stream = functools.partial(framework._C._cuda_getCurrentRawStream, framework.cuda.current_device())
    tail = tuple(constants[name] for name in kernel.arg_names if name in constants)
    resident = programs_at_once(made.metadata.num_warps, made.n_regs)
    return Loaded(launcher(made, stream, like, tail), resident)


def _interpret(kernel: Any, constants: dict[str, Any], programs: int, *args: Any) -> None:
    """Launch an interpreted kernel.

    Triton's own functions, `tl.max` or `tl.zeros_like`, patch the language again at each call: a third of the time of
    a launch. Once in a launch for the names of a module is enough, since what is patched stays so until its end.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_lang, patched = interpreter._patch_lang, {}

    def patch_once(function: Any) -> Any:
        names = id(function.__globals__)
        if names not in patched:
            patched[names] = patch_lang(function)
        return patched[names]

    interpreter._patch_lang = patch_once
    try:
        kernel[(programs,)](*args, **constants)
    finally:
        interpreter._patch_lang = patch_lang


def launcher(made: Any, stream: Callable[[], int], like: tuple, tail: tuple) -> Callable[..., None]:
    """Return launch(programs, *args) of a compiled kernel, on the stream that is current then.

    By the entry point that Triton 3.3 to 3.9 share; or, sooner by a microsecond, by the C function behind it, which
    takes other arguments in each version: they are read from a call with a function in its place. A kernel that needs
    scratch memory, or is instrumented, gets from Triton what it needs at each launch.
    """
    run, loaded = made.run, (made.function, made.packed_metadata, None, None, None)  # launch metadata, hooks
    function, noted = getattr(run, "launch", None), []
    needs = "global_scratch_size", "profile_scratch_size", "gsan_enabled"
    if function is not None and not any(getattr(run, name, 0) for name in needs):
        # Numbers that differ and objects of their own: equal ones could change places unseen.
        grid, every = (3, 5, 7, object()), tuple(object() for _ in (*like, *tail))
        run.launch = lambda *given: noted.append(given)
        try:
            run(*grid, *loaded, *every)
        finally:
            run.launch = function
    for given in noted:
        flat, nested = given[4 : -len(every)], given[4:-1]
        if given == (*grid, *flat, *every):
            return lambda programs, *args: function(programs, 1, 1, stream(), *flat, *args, *tail)
        if given == (*grid, *nested, every):
            return lambda programs, *args: function(programs, 1, 1, stream(), *nested, (*args, *tail))
    return lambda programs, *args: run(programs, 1, 1, stream(), *loaded, *args, *tail)


def uses_pdl() -> bool:
    """Return whether launches use programmatic dependent launch: a kernel starts while the one before it drains, and
    waits for the end of that one before the first read. From sm_90 on, unless the host's FD_ENABLE_PDL is 0."""
    cuda = importlib.import_module("triton.language.extra.cuda")
    options = importlib.import_module("triton.backends.nvidia.compiler").CUDAOptions
    if not hasattr(cuda, "gdc_wait") or not hasattr(options, "launch_pdl") or os.environ.get("FD_ENABLE_PDL") == "0":
        return False
    with triton_driver():
        return importlib.import_module("triton.runtime.driver").driver.active.get_current_target().arch >= 90


def programs_at_once(num_warps: int, registers: int) -> int:
    """Return how many programs of so many warps, and registers a thread, any multiprocessor from sm_80 on holds."""
    a_warp = 32 * (-(-registers // 8) * 8)
    warps = _REGISTERS // 4 // a_warp * 4  # each quarter of a multiprocessor has its own registers
    return max(1, min(warps // num_warps, _WARPS // num_warps, _PROGRAMS))
