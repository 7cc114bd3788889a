"""Every reason why something is off, and every error, of the package: one table, in one place.

A reason is a code, the facts that fill its sentence, and a remedy. `Report` and the commands
read this table, so a reason has one sentence, and none can be missing from the documents.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class Entry:
    """A row of the table: `sentence` with {named} facts, and the `remedy` that a user can act on.

    rule: what is left out by design, or was not asked for: never an error, under `strict` neither.
    """

    sentence: str
    remedy: str
    rule: bool = False


def _read_table(text: str) -> dict[str, Entry]:
    """Read rows of `code: sentence` and `-> remedy`, "(rule)" behind the code of a rule; a longer row is indented.

    Without a remedy there is nothing to do.
    """
    table: dict[str, Entry] = {}
    lines = [line for line in text.strip().splitlines() if line and not line.startswith("#")]
    for row in re.split(r"\n(?=\S)", "\n".join(lines)):
        head, _, remedy = re.sub(r"\n +", " ", row).partition(" -> ")
        name, sentence = head.split(": ", 1)
        code = name.removesuffix(" (rule)")
        assert code not in table, code
        table[code] = Entry(sentence, remedy or "nothing to do", rule=name != code)
    return table


TABLE = _read_table("""
# Whether fusion was asked for at all.
not_asked (rule): fusion was not asked for
    -> set FD_FUSION_CONFIG='{{}}', pass --fusion-config, or give the model a FusionConfig
kill_switch (rule): FD_FUSION_DISABLE is set
    -> unset FD_FUSION_DISABLE to allow fusion
disabled (rule): {flag} is false in the fusion config
    -> set {flag} to true
two_configs: layers of one model carry different fusion configs: {first} and {second}
    -> give every layer of the model the same FusionConfig

# Whether a pair can have a Site.
one_rank (rule): one rank: there is nothing to reduce
no_pairs: no known (row-parallel linear, norm) pair in {model}
    -> name them, bind(model, pairs=...), as help(fd_fusion.bind) shows; for FastDeploy see its supported decoders
unclear_pairs: {model} has {producers} layers that all-reduce and {norms} RMSNorms of their width, where one more than
    the layers would show which feeds which
    -> name the pairs, bind(model, pairs=...), as help(fd_fusion.bind) shows
# A rule: whether a norm reads the sum, the user alone knows.
unnamed (rule): {layer} all-reduces, and no pair names it
    -> name its pair too, if a norm reads its sum, bind(model, pairs=...)
groups_differ: producers of one norm reduce over different groups: {groups}
    -> use one tensor-parallel group for the block
not_reduced: {producer} has reduce_results=False: another layer owes its reduction
    -> leave it, or set reduce_results=True
reduced_inside: {inner} inside {producer} reduces by itself
    -> give the inner layers reduce_results=False: the block reduces once
no_store: there is no store to vote over: {detail}
    -> start with paddle.distributed.launch and init_parallel_env()

# The vote.
refused: rank {rank} refused: {why}
    -> fix the cause on that rank
never_voted: rank {rank} never voted within {seconds} s
    -> see the log of rank {rank}
gave_up: rank {rank} gathered the votes too late: other ranks had given up waiting
    -> see the log of rank {rank}
structure_differs: rank {rank} built another model: {detail}
    -> start every rank with the same model, config and versions
bind_raised: bind raised {error}
    -> see the log of this rank

# The proving pass.
not_proven: the proving pass has not run yet
    -> run one forward in eager mode
unmatched: {site}: {handed} hand-overs and {finished} finishes in the proving pass, expected one of each
    -> the model's data flow is not the one that this pair expects: report it with the model's class
residual_differs: {site}: the residual differs between ranks, so a reduction before it is missing
    -> check the reductions of the blocks before this site
already_reduced: {site}: the norm gets, in the stock forward, what the producer hands over, so the sum was reduced
    before
    -> remove the block's own all-reduce, or leave the pair unbound
proof_failed: {site}: in row {row} the kernel's {output} is off by {times} times what is allowed
    -> report it with the output of `python -m fd_fusion doctor`
qk_differs: {site}: q and k differ from the stock formula by {error}, more than {budget}
    -> report it with the output of `python -m fd_fusion doctor`
qk_wrote_v: {site}: the kernel of q and k changed v
    -> report it with the output of `python -m fd_fusion doctor`
outputs_differ: with the pairs' own hand-overs and nothing fused, the model's output {output} is not that of the stock
    forward; the first pair whose norm gives something else: {site}
    -> the model's data flow is not the one that its pairs expect: report it with the model's class
stock_differs: the stock forward does not repeat its own bits, so the outputs were compared within twice its own
    spread
    -> nothing to do; in the host's deterministic mode they are compared bit by bit
residual_read: something beside the next norm reads a residual, so two-shot sends the residual back to every rank:
    {why}
    -> nothing to do; the layers are fused all the same
shapes_differ: two stock forwards gave outputs of other numbers or shapes, so nothing can be compared with them
    -> give bind an example that makes a new cache each time
hooked: {layer} has a forward hook that would read a partial sum
    -> remove the hook, or unbind the model
sum_differs: {site}: the sum of the handed-over parts is not the sum that the host makes of them one by one
    -> a part is reduced twice or not at all: report it with the model's class
overwritten: {site}: the partial sum was overwritten between its producer and its norm
    -> the model's data flow is not the one that this pair expects: report it with the model's class
zeros: {site}: every rank handed over zeros, which prove nothing: the model runs as stock until they are not
    -> load the weights; a later eager forward tries again
no_rows_yet: the forward had no rows, which proves nothing: the model runs as stock until there are some
    -> nothing to do; a later eager forward tries again
no_outputs: the forward returned no tensor to compare, which proves nothing: the model runs as stock
    -> give bind an example that returns the model's outputs
not_finite: {what}: no row is finite, which proves nothing: the model runs as stock until one is
    -> check the weights and the example's input; a later eager forward tries again
inputs_not_copied: the arguments of the first forward cannot be copied, so it cannot be run a second time: {error}
    -> give bind an example
proof_raised: {site}: the fused call raised {error}
    -> see the log of this rank
forward_raised: a forward of bind, the {which} one, raised {error}
    -> see the log of this rank
not_compared: what the forwards of bind returned cannot be compared: {error}
    -> give bind an example that returns the model's output tensors
out_of_step: rank {rank} left the {which} forward of bind where other ranks went on ({why}): the ranks' collectives
    are out of step, and every later sum would be wrong
    -> see the log of rank {rank}, and restart the ranks

# Using a Site.
double_hand_over: {site}: a second partial sum was handed over before the first was finished
    -> a forward before this one raised and the model was entered by `forward`: call the model itself; or the norm of
       this pair did not run: unbind the model or report its class
other_tensor: {site}: finish() got another tensor than the one handed over
    -> the norm does not read what the linear gives: leave this pair out, bind(model, pairs=...), or unbind
changed_in_place: {site}: the partial sum was changed in place between its producer and its norm, so the change would
    count once for each rank
    -> change the sum after the norm, or unbind the model
nothing_handed_over: {site}: the norm ran, and the linear had handed nothing over since its last sum
    -> the model runs these two in another order: name the pairs as they run, bind(model, pairs=...)
two_callers: {site}: used by {second} while {first} had not finished
    -> run a bound model from one thread and one stream at a time
gradients: {layer}: gradients are recorded, and a fused op has none
    -> run the model under paddle.no_grad(), or unbind it to train it
too_many_rows: T={rows} is above the limit of {limit} rows
    -> raise max_token_num, or tune the limit
no_rows: T=0: there is nothing to compute
tracing: the proving pass runs in eager mode only
    -> run one eager forward before capture

# fastdeploy
draft_model (rule): {model} is a draft model: one layer, whose MLP feeds no norm of its own
shared_with_draft (rule): the draft model runs this norm too, on sums of its own
sequence_parallel: sequence-parallel MoE splits the rows over the ranks
    -> start the server with --disable-sequence-parallel-moe to fuse the attention's pairs
expert_parallel (rule): expert parallel: the experts are not split over the group
proxy_rmsnorm: FD_USE_PHI_RMSNORM asks for another norm
    -> unset FD_USE_PHI_RMSNORM to fuse
two_batch_overlap: {model} runs two batches at once, from two threads
read_between_layers: the model reads a sum between its layers: `{line}`
    -> nothing to do: fused, that sum would be partial
split_token: the linear splits its rows over the ranks
unknown_block: {block} reduces in a way that is not known
    -> report it with the version of FastDeploy
pipeline_boundary (rule): layer {layer} is not on this rank
quantised_norm: the norm quantises its output
norm_bias: the norm has a bias
wide_residual: the host keeps the residual in {got} beside activations in {dtype}
    -> nothing to do: one kernel reads both in one dtype
unknown_norm: {norm} is not a plain RMSNorm over the last dimension
symbol_moved: {path} is not where this version of fd_fusion expects it
    -> install an fd_fusion made for this FastDeploy, or report its version

# Backends.
no_paddle: Paddle cannot be imported: {detail}
    -> pip install "paddlepaddle>=3.3"
old_paddle: Paddle {got} is older than {need}
    -> install Paddle {need} or newer
no_triton: Triton cannot be imported: {detail}
    -> pip install "triton>=3.3"
backend_failed: the {backend} backend cannot be used: {error}
    -> fix its package, or name another backend
dtype: dtype {got} is not one of {allowed}
    -> use one of {allowed}
eps: eps {got} is not a positive float32 number
    -> give the norm an eps, 1e-6 for example
world_size: {got} ranks; this backend takes {allowed}
    -> choose another tensor-parallel size
hidden_size: hidden size {got} is not {need}
    -> pad the hidden size, or leave this pair unfused
no_fp8: {got}: the kernel quantises {need}
fp8_differs: the host's quantiser is not known: {detail}
    -> report it with the host's version; the host quantises
fp8_not_taken: no layer took the FP8 of its norm in the proving pass
deterministic: deterministic mode is on and the {backend} backend is not batch invariant
    -> name the triton backend
qk_zero: {site}: its weights are zero, so nothing shows whether the kernel is right
    -> bind when the weights are loaded
qk_stock (rule): q and k are normalised by the stock formula: backend {backend} on a {device}
    -> name the triton backend

# comm and the triton backend.
other_machine: ranks {first} and {second} are on different machines
    -> use one machine for each tensor-parallel group
mig: rank {rank} is on a MIG instance, which has no peer access
    -> turn MIG off, or use one rank
same_pid: ranks {first} and {second} both have pid {pid}, so they are one process to the CUDA driver
    -> start the ranks as processes of one pid namespace (for containers: --pid=host)
no_peer_access: the memory of another rank cannot be mapped: {error}
    -> give the ranks GPUs with P2P (`nvidia-smi topo -p2p r`) and, in containers, one IPC and pid namespace
probe_failed: what rank {rank} stored into this rank's memory did not arrive
    -> P2P between these two GPUs does not work (IOMMU or ACS settings): see `nvidia-smi topo -p2p r`
triton_mode: Triton was imported before fd_fusion in the other mode (TRITON_INTERPRET={need} is needed)
    -> set TRITON_INTERPRET={need} for the whole process
workspace_small: the workspace needs {need} bytes and may have {got}
    -> raise workspace_mb in the fusion config
launches_differ: rank {rank} would launch other programs than rank 0: {got}, rank 0 {need}
    -> give all ranks one configuration, one kind of GPU and one version of Triton
old_gpu: the GPU is sm_{got}, older than sm_{need}
    -> use an A100 or newer
two_streams: two streams used one workspace at once: op {op}, row {row}, launch {launch}
    -> run a bound model from one stream at a time, then call reset() on every rank
aborted: another rank ran out of time in a fused call and ended it for the whole group
    -> see the logs of the other ranks; restart the ranks, or call reset() on every rank
dropped: a bound {model} was dropped without unbind: its workspace of {bytes} bytes stays open until the next bind
    -> call fd_fusion.unbind(model) on every rank before the model goes
closed: the workspace is closed: its model was unbound, or is gone
    -> bind the model again, then trace and capture it again

# cli and the tuning table.
two_paddles: two distributions of Paddle overwrite each other's files: paddlepaddle {first}, paddlepaddle-gpu {second}
    -> uninstall both, then install the one that this machine needs
flashinfer_mixed: FlashInfer's packages are of different versions, and its Python calls its kernels by position:
    {versions}
    -> install one version of all of them
table_unusable: the tuning table {path} cannot be used: {error}
    -> run `python -m fd_fusion tune` again, or remove the file
table_stale: the tuning table was measured with {got}, and this process has {need}
    -> run `python -m fd_fusion tune` again
table_differs: the ranks read different tuning tables, so none is used
    -> give all ranks one XDG_CACHE_HOME
never_wins (rule): the tuning table shows that fusing wins for no number of rows with {size} ranks, H={hidden_size},
    {dtype}
    -> set max_token_num to fuse all the same
open_failed: the workspace could not be opened: {error}
    -> see the log of this rank
dead_group: a fused call ran out of time: op {op}, row {row}, launch {launch}, missing rank {missing}
    -> restart the ranks, or call reset() on every rank
silent_rank: rank {rank} has given no sign of life for {seconds} s
    -> see the log of that rank: it was stopped or killed
no_presence: a rank that is missing outside of a fused call will not be named: {why}
    -> fix the cause on that rank

# flashinfer: the FlashInfer backend and its loader.
flashinfer_missing: FlashInfer is not installed
    -> install FlashInfer, or name the triton backend
flashinfer_build: FlashInfer {version} did not build its kernel, or it cannot be loaded: {error}
    -> install apache-tvm-ffi and FlashInfer 0.6.12, 0.6.17 or 0.7.2.post1, compile its kernel where torch is, or name
    the triton backend
flashinfer_no_compiler: the kernel of FlashInfer {version} must be compiled and {tool} is not found
    -> install {tool}
flashinfer_no_gpu: FlashInfer's kernel runs on a GPU only
    -> name the triton or paddle backend
flashinfer_arch: FlashInfer {version} has no kernel for sm_{arch}
    -> use {allowed}, or name the triton backend
flashinfer_weight_dtype: FlashInfer reads the norm's weight as {need}, and it is {got}
    -> name the triton backend
flashinfer_weight_offset: FlashInfer {version} cannot add {offset} to the norm's weight
    -> install FlashInfer 0.6.12 or newer
flashinfer_partial_warp: FlashInfer {version} runs H={hidden_size} in blocks of {threads} threads, not whole warps,
    and sums wrongly
    -> install FlashInfer 0.6.15 or newer, or name the triton backend
flashinfer_differs: rank {rank} has FlashInfer {got}, rank 0 has {need}
    -> install the same FlashInfer on every rank
first_call_wrong: the first call of {variant} gave a wrong {output}: {wrong} of {words} words, the first at {where}
    -> report it with the output of `python -m fd_fusion doctor`
""")


@dataclass(frozen=True)
class Reason:
    """Why something is off: a code of `TABLE` and the facts of its sentence. `str()` gives the sentence.

    texts: sentence and remedy of a rank with another version, whose code or facts are not in this table.
    cause: the reason of that rank, where the code is "refused".
    """

    code: str
    facts: tuple[tuple[str, Any], ...] = ()
    texts: tuple[str, str] | None = None
    cause: Reason | None = None

    def __str__(self) -> str:
        return self.texts[0] if self.texts else TABLE[self.code].sentence.format(**dict(self.facts))

    @property
    def remedy(self) -> str:
        if self.texts:
            return self.texts[1]
        if self.cause is not None:
            return f"on rank {dict(self.facts)['rank']}: {self.cause.remedy}"
        return TABLE[self.code].remedy.format(**dict(self.facts))

    @property
    def is_rule(self) -> bool:
        """Return whether this is never an error."""
        return self.code in TABLE and TABLE[self.code].rule

    @property
    def root(self) -> Reason:
        """Return what was wrong in the first place: the innermost cause."""
        return self if self.cause is None else self.cause.root

    def to_dict(self) -> dict[str, Any]:
        cause = {"cause": self.cause.to_dict()} if self.cause is not None else {}
        return {"code": self.code, "facts": dict(self.facts), "text": str(self), "remedy": self.remedy, **cause}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Reason:
        """Read a reason of another rank; what this version does not know is kept as text. Raises ValueError."""
        try:
            code, facts = data["code"], dict(data["facts"])
            if _facts_of(code) == set(facts):
                cause = data.get("cause")
                return cls(code, _sorted(facts), cause=cls.from_dict(cause) if cause else None)
            return cls(code, _sorted(facts), texts=(str(data["text"]), str(data["remedy"])))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a reason: {type(error).__name__}: {error}") from None


def because(code: str, **facts: Any) -> Reason:
    """Make a `Reason`. An unknown code or a missing fact is our own mistake and asserts at once."""
    fields = _facts_of(code)
    assert fields is not None, f"no reason {code!r} in the table"
    assert fields == set(facts), f"reason {code!r} takes {sorted(fields)}, got {sorted(facts)}"
    return Reason(code, _sorted(facts))


def refused_by(rank: int, why: Reason) -> Reason:
    """Make the reason that `rank` refused, with its sentence, its remedy and its code."""
    return Reason("refused", _sorted({"rank": rank, "why": str(why)}), cause=why)


def _facts_of(code: str) -> set[str] | None:
    """Return the names in the sentence and the remedy of a code; None if there is no such code."""
    entry = TABLE.get(code)
    if entry is None:
        return None
    return {f for text in (entry.sentence, entry.remedy) for _, f, _, _ in string.Formatter().parse(text) if f}


def _sorted(facts: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(facts.items()))


class FusionError(RuntimeError):
    """An error of this package, with its `reason` and remedy."""

    def __init__(self, reason: Reason):
        super().__init__(f"fd_fusion: {reason}. Remedy: {reason.remedy}.")
        self.reason = reason


def closed(*_: Any, **__: Any) -> NoReturn:
    """Raise, in the place of what was closed: no call before that pays for a check."""
    raise FusionError(because("closed"))


class HandOverError(FusionError):
    """A partial sum was handed over and not finished, or finished and not handed over."""


class BindError(FusionError):
    """What `strict` or a named backend insists on is off; raised on all ranks alike, after the vote."""


class FusionTimeout(FusionError):
    """A fused call ran out of time: a rank is missing. The workspace is dead until a collective reset."""
