"""Every reason why something is off, and every error, of the package: one table, in one place.

A reason is a code, the facts that fill its sentence, and a remedy. `Report`, the command line and the README
all read this table, so a reason cannot be told in two ways, and none can be missing from the documents.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A row of the table: `sentence` with {named} facts, and the `remedy` that a user can act on."""

    sentence: str
    remedy: str


TABLE: dict[str, Entry] = {
    # Whether fusion was asked for at all.
    "not_asked": Entry(
        "fusion was not asked for",
        "set FD_FUSION_CONFIG='{{}}', pass --fusion-config, or give the model a FusionConfig",
    ),
    "kill_switch": Entry("FD_FUSION_DISABLE is set", "unset FD_FUSION_DISABLE to allow fusion"),
    "disabled": Entry("{flag} is false in the fusion config", "set {flag} to true"),
    "two_configs": Entry(
        "layers of one model carry different fusion configs: {first} and {second}",
        "give every layer of the model the same FusionConfig",
    ),
    # Whether a pair can have a Site.
    "one_rank": Entry("one rank: there is nothing to reduce", "nothing to do"),
    "no_pairs": Entry(
        "no known (row-parallel linear, norm) pair in {model}", "see the README for the supported decoders"
    ),
    "groups_differ": Entry(
        "producers of one norm reduce over different groups: {groups}",
        "use one tensor-parallel group for the block",
    ),
    "not_reduced": Entry(
        "{producer} has reduce_results=False: somebody else owes its reduction",
        "leave it, or set reduce_results=True",
    ),
    "reduced_inside": Entry(
        "{inner} inside {producer} reduces by itself",
        "give the inner layers reduce_results=False: the block reduces once",
    ),
    "no_store": Entry(
        "there is no store to vote over: {detail}",
        "start with paddle.distributed.launch and init_parallel_env()",
    ),
    # The vote.
    "refused": Entry("rank {rank} refused: {why}", "mend the cause on that rank"),
    "never_voted": Entry("rank {rank} never voted within {seconds} s", "see the log of rank {rank}"),
    "gave_up": Entry(
        "rank {rank} gathered the votes too late: other ranks had given up waiting",
        "see the log of rank {rank}",
    ),
    "structure_differs": Entry(
        "rank {rank} built another model: {detail}",
        "start every rank with the same model, config and versions",
    ),
    # The proving pass.
    "not_proven": Entry("the proving pass has not run yet", "run one forward in eager mode"),
    "unmatched": Entry(
        "{site}: {handed} hand-overs and {finished} finishes in the proving pass, expected one of each",
        "the model's data flow is not the one that this pair expects: report it with the model's class",
    ),
    "residual_differs": Entry(
        "{site}: the residual differs between ranks, so a reduction before it is missing",
        "check the reductions of the blocks before this site",
    ),
    "already_reduced": Entry(
        "{site}: every rank handed over the same bits, so the sum was reduced before",
        "remove the block's own all-reduce, or leave the pair unbound",
    ),
    "proof_failed": Entry(
        "{site}: fused and stock results differ by {error}, more than {budget} of {output}",
        "report it with the output of `python -m fd_fusion doctor`",
    ),
    "outputs_differ": Entry(
        "the model's output {output} differs from stock by {error}, more than {budget}",
        "a partial sum is read outside its pair: report it with the model's class",
    ),
    "proof_raised": Entry("{site}: the fused call raised {error}", "see the log of this rank"),
    "forward_raised": Entry("the first forward after bind raised {error}", "see the log of this rank"),
    # Using a Site.
    "double_hand_over": Entry(
        "{site}: a second partial sum was handed over before the first was finished",
        "the norm of this pair did not run: unbind the model or report its class",
    ),
    "other_tensor": Entry(
        "{site}: finish() got another tensor than the one handed over",
        "something changed the partial sum between the linear and the norm: unbind the model or report its class",
    ),
    "nothing_handed_over": Entry(
        "{site}: finish() was called with nothing handed over", "run the pair's linear before its norm"
    ),
    "two_users": Entry(
        "{site}: used by {second} while {first} had not finished",
        "run a bound model from one thread and one stream at a time",
    ),
    "too_many_rows": Entry("T={rows} is above the limit of {limit} rows", "raise max_token_num, or tune the limit"),
    "no_rows": Entry("T=0: there is nothing to compute", "nothing to do"),
    "tracing": Entry("the proving pass runs in eager mode only", "run one eager forward before capture"),
    # fastdeploy
    "draft_model": Entry("{model} is a draft model: its layers are used in another way", "nothing to do"),
    "sequence_parallel": Entry("sequence-parallel MoE splits the rows over the ranks", "nothing to do"),
    "expert_parallel": Entry("expert parallel: the experts are not split over the group", "nothing to do"),
    "proxy_rmsnorm": Entry("FD_USE_PHI_RMSNORM asks for another norm", "unset FD_USE_PHI_RMSNORM to fuse"),
    "two_batch_overlap": Entry("{model} runs two batches at once, from two threads", "nothing to do"),
    "read_between_layers": Entry(
        "the model reads a sum between its layers: `{line}`", "nothing to do: fused, that sum would be partial"
    ),
    "split_token": Entry("the linear splits its rows over the ranks", "nothing to do"),
    "unknown_block": Entry("{block} reduces in a way that is not known", "report it with the version of FastDeploy"),
    "pipeline_boundary": Entry("layer {layer} is not on this rank", "nothing to do"),
    "quantised_norm": Entry("the norm quantises its output", "nothing to do"),
    "norm_bias": Entry("the norm has a bias", "nothing to do"),
    "wide_residual": Entry(
        "the host keeps the residual in {got} beside activations in {dtype}",
        "nothing to do: one kernel reads both in one dtype",
    ),
    "unknown_norm": Entry("{norm} is not a plain RMSNorm over the last dimension", "nothing to do"),
    "symbol_moved": Entry(
        "{path} is not where this version of fd_fusion expects it",
        "install an fd_fusion made for this FastDeploy, or report its version",
    ),
    # The command line.
    "no_gpu": Entry(
        "the benchmarks launch on torch tensors on a GPU: {detail}",
        "run this on a machine with an NVIDIA GPU and torch",
    ),
    # Backends.
    "no_paddle": Entry("Paddle cannot be imported: {detail}", 'pip install "paddlepaddle>=3.3"'),
    "old_paddle": Entry("Paddle {got} is older than {need}", "install Paddle {need} or newer"),
    "no_triton": Entry("Triton cannot be imported: {detail}", 'pip install "triton>=3.3"'),
    "backend_failed": Entry(
        "the {backend} backend cannot be used: {error}", "mend its package, or name another backend"
    ),
    "dtype": Entry("dtype {got} is not one of {allowed}", "use one of {allowed}"),
    "world_size": Entry("{got} ranks; this backend takes {allowed}", "choose another tensor-parallel size"),
    "hidden_size": Entry("hidden size {got} is not {need}", "pad the hidden size, or leave this pair unfused"),
    "deterministic": Entry(
        "deterministic mode is on and the {backend} backend is not batch invariant", "name the triton backend"
    ),
    "qk_stock": Entry(
        "q and k are normalised by the stock formula: backend {backend} on a {device}", "name the triton backend"
    ),
    # comm and the triton backend.
    "other_machine": Entry(
        "ranks {first} and {second} are on different machines", "use one machine for each tensor-parallel group"
    ),
    "mig": Entry("rank {rank} is on a MIG instance, which has no peer access", "turn MIG off, or use one rank"),
    "same_pid": Entry(
        "ranks {first} and {second} both have pid {pid}, so the CUDA driver cannot tell them apart",
        "start the ranks as processes of one pid namespace (for containers: --pid=host)",
    ),
    "no_peer_access": Entry(
        "the memory of another rank cannot be mapped: {error}",
        "give the ranks GPUs with P2P (`nvidia-smi topo -p2p r`) and, in containers, one IPC and pid namespace",
    ),
    "probe_failed": Entry(
        "what rank {rank} stored into this rank's memory did not arrive",
        "P2P between these two GPUs does not work (IOMMU or ACS settings): see `nvidia-smi topo -p2p r`",
    ),
    "triton_mode": Entry(
        "Triton was imported before fd_fusion in the other mode (TRITON_INTERPRET={need} is needed here)",
        "set TRITON_INTERPRET={need} for the whole process",
    ),
    "workspace_small": Entry(
        "the workspace needs {need} bytes and may have {got}", "raise workspace_mb in the fusion config"
    ),
    "old_gpu": Entry("the GPU is sm_{got}, older than sm_{need}", "use an A100 or newer"),
    "two_streams": Entry(
        "two streams used one workspace at once: op {op}, row {row}, epoch {epoch}",
        "run a bound model from one stream at a time, then call reset() on every rank",
    ),
    "aborted": Entry(
        "another rank ran out of time in a fused call and ended it for the whole group",
        "see the logs of the other ranks; restart the ranks, or call reset() on every rank",
    ),
    "closed": Entry("the workspace is closed", "bind the model again"),
    # cli and the tuning table.
    "two_paddles": Entry(
        "two distributions of Paddle overwrite each other's files: paddlepaddle {first}, paddlepaddle-gpu {second}",
        "uninstall both, then install the one that this machine needs",
    ),
    "flashinfer_mixed": Entry(
        "FlashInfer's packages are of different versions, and its Python calls its kernels by position: {versions}",
        "install one version of all of them",
    ),
    "table_unusable": Entry(
        "the tuning table {path} cannot be used: {error}", "run `python -m fd_fusion tune` again, or remove the file"
    ),
    "table_stale": Entry(
        "the tuning table was measured with {got}; here is {need}", "run `python -m fd_fusion tune` again"
    ),
    "table_differs": Entry(
        "the ranks read different tuning tables, so none is used", "give all ranks one XDG_CACHE_HOME"
    ),
    "never_wins": Entry(
        "the tuning table says that fusing never wins here for {size} ranks, H={hidden_size}, {dtype}",
        "set max_token_num to fuse all the same",
    ),
    "open_failed": Entry("the workspace could not be opened: {error}", "see the log of this rank"),
    "dead_group": Entry(
        "a fused call ran out of time: op {op}, row {row}, epoch {epoch}, missing rank {missing}",
        "restart the ranks, or call reset() on every rank",
    ),
    "silent_rank": Entry(
        "rank {rank} has given no sign of life for {seconds} s", "see the log of that rank: it was stopped or killed"
    ),
    "no_presence": Entry(
        "a rank that is missing outside of a fused call will not be named: {why}", "mend the cause on that rank"
    ),
    # flashinfer: the FlashInfer backend and its loader.
    "flashinfer_missing": Entry("FlashInfer is not installed", "install FlashInfer, or name the triton backend"),
    "flashinfer_import": Entry(
        "FlashInfer {version} does not import under {framework}: {error}",
        "install flashinfer-python-paddle, compile the kernel beforehand where torch is, or name the triton backend",
    ),
    "flashinfer_foreign": Entry(
        "{module} was imported before and is bound to another framework than {framework}",
        "import FlashInfer with torch in another process, or name the triton backend",
    ),
    "no_torch_proxy": Entry("this Paddle has no torch proxy: {error}", "install Paddle 3.3 or newer"),
    "flashinfer_no_kernel": Entry(
        "FlashInfer {version} has no trtllm_allreduce_fusion", "install a version that the README names"
    ),
    "flashinfer_signature": Entry(
        "FlashInfer {version} wants {names}, which is unknown here", "install a version that the README names"
    ),
    "flashinfer_build": Entry("FlashInfer {version} did not build its kernel: {error}", "see the log of this rank"),
    "flashinfer_no_compiler": Entry(
        "the kernel of FlashInfer {version} must be compiled and {tool} is not found", "install {tool}"
    ),
    "flashinfer_no_gpu": Entry("FlashInfer's kernel runs on a GPU only", "name the triton or paddle backend"),
    "flashinfer_arch": Entry(
        "FlashInfer {version} has no kernel for sm_{arch}", "use {allowed}, or name the triton backend"
    ),
    "flashinfer_weight_dtype": Entry(
        "FlashInfer reads the norm's weight as {need}, and it is {got}", "name the triton backend"
    ),
    "flashinfer_weight_offset": Entry(
        "FlashInfer {version} cannot add {offset} to the norm's weight", "install FlashInfer 0.6.12 or newer"
    ),
    "flashinfer_partial_warp": Entry(
        "FlashInfer {version} runs H={hidden_size} in blocks of {threads} threads, not whole warps, and sums wrongly",
        "install FlashInfer 0.6.15 or newer, or name the triton backend",
    ),
    "flashinfer_multicast": Entry(
        "FlashInfer {version} opens its workspace by multicast, which this GPU lacks: {error}",
        "install a version whose kernel takes our workspace (see the README), or name the triton backend",
    ),
    "flashinfer_no_progress": Entry(
        "FlashInfer {version} does not show its control block, so nobody could tell that a call hangs",
        "install a version that the README names",
    ),
    "flashinfer_differs": Entry(
        "rank {rank} has FlashInfer {got}, rank 0 has {need}", "install the same FlashInfer on every rank"
    ),
    "flashinfer_wrong": Entry(
        "the first call gave {got} where {need} was due", "report it with the output of `python -m fd_fusion doctor`"
    ),
}


@dataclass(frozen=True)
class Reason:
    """Why something is off: a code of `TABLE` and the facts of its sentence. `str()` gives the sentence."""

    code: str
    facts: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return TABLE[self.code].sentence.format(**dict(self.facts))

    @property
    def remedy(self) -> str:
        return TABLE[self.code].remedy.format(**dict(self.facts))

    def to_dict(self) -> dict[str, Any]:
        return {"code": self.code, "facts": dict(self.facts), "text": str(self), "remedy": self.remedy}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Reason:
        return because(data["code"], **data["facts"])


def because(code: str, **facts: Any) -> Reason:
    """Make a `Reason`. An unknown code or a missing fact is our own mistake and asserts at once."""
    entry = TABLE.get(code)
    assert entry is not None, f"no reason {code!r} in the table"
    fields = {f for text in (entry.sentence, entry.remedy) for _, f, _, _ in string.Formatter().parse(text) if f}
    assert fields == set(facts), f"reason {code!r} takes {sorted(fields)}, got {sorted(facts)}"
    return Reason(code, tuple(sorted(facts.items())))


class FusionError(RuntimeError):
    """An error of this package. `reason` says what and what to do."""

    def __init__(self, reason: Reason):
        super().__init__(f"fd_fusion: {reason}. Remedy: {reason.remedy}.")
        self.reason = reason


class HandOverError(FusionError):
    """A partial sum was handed over and not finished, or finished and not handed over."""


class BindError(FusionError):
    """`bind` failed under `strict` or for a named backend; raised on all ranks alike, after the vote."""


class FusionTimeout(FusionError):
    """A fused call ran out of time: a rank is missing. The workspace is dead until a collective reset."""
