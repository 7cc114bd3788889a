"""FlashInfer's unified interface, for a version that has no other: it makes the workspace, over our group.

No release asks for this yet; the older entry is deprecated since 0.6.0, and this is what remains the day it goes.
"""

from __future__ import annotations

from typing import Any

from fd_fusion.backends.flashinfer.calls import parameters, unified_call
from fd_fusion.backends.flashinfer.op import FlashInferOp
from fd_fusion.backends.flashinfer.watchdog import ControlReader
from fd_fusion.backends.flashinfer.workspace import StoreBackend
from fd_fusion.comm.group import Group
from fd_fusion.comm.symmetric_memory import agree_or_raise, as_refusal
from fd_fusion.reasons import FusionError, because
from fd_fusion.spec import OpSpec


def open(spec: OpSpec, group: Group, library: Any, rows: int) -> FlashInferOp:
    """Collective: the same as `flashinfer.open`, with a workspace that FlashInfer makes."""

    def make() -> FlashInferOp:
        workspace = create(spec, group, library, rows)
        # Without the control block nobody could see a call that hangs.
        address = (getattr(workspace, "metadata", None) or {}).get("control_flag_ptr")
        if not address:
            workspace.destroy()
            raise FusionError(because("flashinfer_no_progress", version=library.version))
        call, adds_bias = unified_call(library.unified, workspace)

        def release(*, wait: bool = True) -> bool:
            if wait:
                workspace.destroy()
            return wait

        reader = ControlReader(address)
        return FlashInferOp(spec, group, library, call, adds_bias, rows, spec.workspace_bytes, reader, release)

    op, refusal = as_refusal(make)
    try:
        agree_or_raise(group, "flashinfer_made", refusal, None, spec.timeout_s)
    except FusionError:
        if op is not None:
            op.close()
        raise
    op.warm_up()
    return op


def create(spec: OpSpec, group: Group, library: Any, rows: int) -> Any:
    """FlashInfer's workspace over our group and store, never over the world group that it would take by itself.

    Raises: FusionError: it wants multicast, or something that is unknown here.
    """
    comm = StoreBackend(group, spec.timeout_s)
    given = {
        "backend": "trtllm",
        "world_size": group.size,
        "rank": group.rank,
        "max_token_num": rows,
        "hidden_dim": spec.hidden_size,
        "dtype": getattr(library.framework, spec.dtype),
        "gpus_per_node": group.size,
        "comm_backend": comm,
        "group": comm,  # a version that uses it as a process group fails, where its default would hang a sub-group
    }
    takes = parameters(library.create, oldest=tuple(given)[:8])
    strange = [name for name, must in takes.items() if must and name not in given]
    strange += [f"no {name}" for name in ("comm_backend",) if name not in takes]
    if strange:
        raise FusionError(because("flashinfer_signature", version=library.version, names=", ".join(strange)))
    try:
        return library.create(**{name: value for name, value in given.items() if name in takes})
    except FusionError:
        raise
    except Exception as error:  # voted on; which kind it is only its text tells
        if "multicast" in str(error).lower():
            reason = because("flashinfer_multicast", version=library.version, error=str(error))
            raise FusionError(reason) from None
        raise
