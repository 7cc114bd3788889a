"""What bind's proving pass must see, and what it must not be misled by: 2 ranks, one start for all scenarios.

Each scenario gets a fresh model and returns what this rank found; both ranks must find the same.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import paddle
from support import rank as this
from support.tiny import H, DemoDecoder, hidden

import fd_fusion
from fd_fusion import Decoder, FusionConfig, RMSNorm
from fd_fusion.binding import bind as binding
from fd_fusion.reasons import BindError, FusionError, HandOverError

rank, size = this.start()
X = hidden(2)
CONFIG = FusionConfig(timeout_s=20, max_token_num=8)
ATTENTION = "layers.1.self_attn.o_proj -> layers.1.post_attention_layernorm"


def build(**kwargs):
    return DemoDecoder(rank, size, **kwargs)


def codes(report):
    return sorted({one.reason.code for one in report.rejected})


def bound(model, example=True, config=CONFIG):
    """(report, its reasons, whether the outputs are the stock model's bits afterwards)."""
    stock = model(X)
    run = (lambda: (model(X),)) if example is True else example
    report = fd_fusion.bind(model, config, example=run)
    after = model(X)
    texts = [str(one.reason) for one in report.rejected]
    return {
        "proven": report.proven,
        "codes": codes(report),
        "text": texts[0] if texts else "",
        "stock": same(after, stock),
        "calls": fused_calls(report),
    }


def same(a, b):
    return bool(((a == b) | (paddle.isnan(a) & paddle.isnan(b))).all())


def fused_calls(report):
    return sum(line.calls["fused"] for line in report.sites)


def each_way(change):
    """With and without an example: {"example": ..., "first": ...}."""
    found = {}
    for name, example in (("example", True), ("first", None)):
        model = build()
        change(model)
        found[name] = bound(model, example)
        fd_fusion.unbind(model)
    return found


# --- data flow ------------------------------------------------------------------------------------------------------


def healthy():
    return each_way(lambda model: None)


def delta_in_place():
    """One per cent, added where a hook of the layer cannot be seen: in the forward of the attention."""

    def change(model):
        attention = model.layers[1].self_attn

        def forward(x):
            out = attention.o_proj(x)
            out.add_(0.01 * paddle.ones_like(out))
            return out

        attention.forward = forward

    return each_way(change)


def overwritten_in_place():
    """`copy_` counts no version; the all-reduce of gloo neither."""

    def change(model):
        attention = model.layers[1].self_attn

        def forward(x):
            out = attention.o_proj(x)
            out.copy_(paddle.ones_like(out), False)
            return out

        attention.forward = forward

    return each_way(change)


def reduced_again():
    def change(model):
        attention = model.layers[1].self_attn

        def forward(x):
            out = attention.o_proj(x)
            paddle.distributed.all_reduce(out)
            return out

        attention.forward = forward

    return each_way(change)


def reader_between():
    """The producer's output goes into the next layer by another way, too small for a bound that grows with depth."""

    def change(model):
        attention, mlp = model.layers[1].self_attn, model.layers[1].mlp
        stock, kept = mlp.forward, []

        def listen(x):
            kept[:] = [attention.o_proj(x)]
            return kept[0]

        attention.forward = listen
        mlp.forward = lambda x: stock(x + 1e-6 * kept[0])

    return each_way(change)


def reader_after():
    """A list of auxiliary hidden states keeps what the producer returned."""

    def change(model):
        attention, stock, kept = model.layers[1].self_attn, model.forward, []
        attention.forward = lambda x: kept.append(attention.o_proj(x)) or kept[-1]

        def forward(x):
            kept.clear()
            out = stock(x)
            return paddle.concat([out, kept[0]])

        model.forward = forward

    return each_way(change)


def another_tensor():
    def change(model):
        attention = model.layers[1].self_attn
        attention.forward = lambda x: attention.o_proj(x) * 0.5

    return each_way(change)


def hooks():
    """On a producer: its pair is left out. On a layer that returns the producer's output: the model is unbound."""
    found = {}
    model = build()
    model.layers[1].self_attn.o_proj.register_forward_post_hook(lambda layer, inputs, out: None)
    found["producer"] = bound(model)
    fd_fusion.unbind(model)
    model = build()
    model.layers[1].self_attn.register_forward_post_hook(lambda layer, inputs, out: None)
    found["around"] = bound(model)
    fd_fusion.unbind(model)
    return found


def changed_after_bind():
    """A delta that comes later is an error that names the site, and a hook that comes later is told once."""
    model = build()
    report = fd_fusion.bind(model, CONFIG, example=lambda: (model(X),))
    linear = model.layers[1].self_attn.o_proj

    def steer(layer, inputs, out):
        out.add_(paddle.ones_like(out))

    hook = linear.register_forward_post_hook(steer)
    try:
        model(X)
        code = None
    except HandOverError as error:
        code, text = error.reason.code, str(error)
        assert "layers.1.self_attn.o_proj" in text
    hook.remove()
    for site in report.sites:
        site.site._pending = None
    model(X)
    fd_fusion.unbind(model)
    return {"code": code}


class FinalNormFirst(DemoDecoder):
    """Its order misleads: the norm that runs last is the first that it defines."""

    def __init__(self, rank, size):
        norm = RMSNorm(H)
        super().__init__(rank, size)
        layers = self.layers
        del self.layers, self.norm
        self.norm, self.layers = norm, layers


def a_wrong_order():
    """Stock, with the reason and the bits; the example's own input, which a wrong pair would sum in place, as it was.
    With the pairs named the same model is bound."""
    found = {}
    for name, named, example in (("example", None, True), ("first", None, False), ("named", Decoder(), True)):
        model, x = FinalNormFirst(rank, size), X.clone()
        stock = model(x)
        run = (lambda model=model, x=x: (model(x),)) if example else None
        report = fd_fusion.bind(model, CONFIG, pairs=named, example=run)
        after = model(x)
        near = bool(paddle.allclose(after, stock, rtol=1e-5, atol=1e-6))
        found[name] = [report.proven, codes(report), near and (report.proven or same(after, stock)), same(x, X)]
        fd_fusion.unbind(model)
    return found


# --- zeros, equal shards, no rows -----------------------------------------------------------------------------------


def zeros_then_weights():
    """Zero weights prove nothing; the forward after they were loaded does. A named backend does not end the server."""
    found = {}
    for name, example in (("example", True), ("first", None)):
        model = build()
        weights = {key: value.numpy() for key, value in model.state_dict().items()}
        for parameter in model.parameters():
            if len(parameter.shape) == 2:
                parameter.set_value(paddle.zeros_like(parameter))
        report = fd_fusion.bind(
            model,
            FusionConfig(timeout_s=20, max_token_num=8, backend="paddle", strict=True),
            example=(lambda m=model: (m(X),)) if example else None,
        )
        for _ in range(1 if example else 2):  # a third pass in vain follows below, and strict ends at the fourth
            model(X)
        waiting = report.waiting.code
        assert "site" not in model.norm.__dict__ and not report.proven and not report.rejected
        model.set_state_dict({key: paddle.to_tensor(value) for key, value in weights.items()})
        reference = build()
        near = paddle.allclose(model(X), reference(X), rtol=1e-5, atol=1e-6)
        found[name] = {
            "waiting": waiting,
            "proven": report.proven,
            "fused": fused_calls(report),
            "near": bool(near),
            "left": "forward" in model.__dict__,
        }
        fd_fusion.unbind(model)
    return found


def equal_shards():
    """Every rank seeds alike: the shares are equal, and a sum all the same."""

    def change(model):
        paddle.seed(3)
        for parameter in model.parameters():
            if len(parameter.shape) == 2:
                parameter.set_value(paddle.randn(parameter.shape))

    return each_way(change)


def no_rows_first():
    """An idle data-parallel rank: the first forward has no rows, and is no miss."""
    model = build()
    report = fd_fusion.bind(model, CONFIG)
    assert model(X[:0]).shape == [0, H]
    waiting, rejected = report.waiting.code, codes(report)
    model(X)
    proven, calls = report.proven, fused_calls(report)
    fd_fusion.unbind(model)
    return {"waiting": waiting, "codes": rejected, "proven": proven, "fused": calls}


def nan_in_stock():
    """A model whose own outputs hold NaN gives the same ones bound."""

    def change(model):
        stock = model.forward

        def forward(x):
            out = stock(x)
            out[0] = float("nan")
            return out

        model.forward = forward

    return each_way(change)


class Slots:
    __slots__ = ("hidden",)

    def __init__(self, hidden):
        self.hidden = hidden


def outputs_of_a_kind():
    """A reader between the layers, that only outputs which are looked at can show."""
    found = {}
    kinds = {"none": lambda y: None, "iterator": lambda y: iter([y]), "numpy": lambda y: y.numpy(), "slots": Slots}
    for kind, give in kinds.items():
        model = build()
        attention, mlp = model.layers[1].self_attn, model.layers[1].mlp
        stock, kept, inner, last = mlp.forward, [None], model.forward, [None]

        def listen(x, attention=attention, kept=kept):
            kept[0] = attention.o_proj(x)
            return kept[0]

        def forward(x, give=give, inner=inner, last=last):
            last[0] = inner(x)
            return give(last[0])

        attention.forward = listen
        mlp.forward = lambda x, stock=stock, kept=kept: stock(x + kept[0])
        model.forward = forward
        model(X)
        want = last[0].clone()
        report = fd_fusion.bind(model, CONFIG, example=lambda model=model: model(X))
        model(X)
        waiting = report.waiting and report.waiting.code
        found[kind] = [report.proven, waiting or codes(report), same(last[0], want)]
        fd_fusion.unbind(model)
    return found


def nothing_finite():
    """NaN is the mark of what was handed over, and equal to itself: it shows nothing."""
    found = []
    for number in (float("nan"), float("inf")):
        model = build()
        weight = model.layers[0].self_attn.o_proj.weight
        keep = weight.clone()
        weight.set_value(paddle.full_like(weight, number))
        report = fd_fusion.bind(model, CONFIG, example=lambda model=model: model(X))
        found.append([report.proven, report.waiting and report.waiting.code])
        weight.set_value(keep)
        model(X)
        found.append(report.proven)
        fd_fusion.unbind(model)
    return found


def traced_before_proven():
    """By AST and by SOT the numbers are right: the forward that waits has the signature of the model's own.

    A frame that SOT does not take runs eager, and so runs the pass.
    """
    found = []
    for full_graph in (True, False):
        model = build()
        stock, report = model(X), fd_fusion.bind(model, CONFIG)
        traced = paddle.jit.to_static(model, full_graph=full_graph)
        found.append(bool(paddle.allclose(traced(X), stock, rtol=1e-5, atol=1e-6)) and not (full_graph and report.proven))
        fd_fusion.unbind(model)
    return found


# --- errors and spread ----------------------------------------------------------------------------------------------


def raises_in(which, strict=False):
    """The `which`-th forward of bind raises on the last rank; the stock one does not repeat its bits, so there are 3."""
    model, count = build(), []

    def example():
        count.append(None)
        out = model(X)
        if len(count) == which and rank == size - 1:
            raise RuntimeError(f"on purpose in forward {which}")
        return (out + len(count),)

    config = FusionConfig(timeout_s=20, max_token_num=8, strict=strict)
    stock = model(X)
    try:
        report = fd_fusion.bind(model, config, example=example)
        text = str(report.rejected[0].reason)
        assert not report.sites and same(model(X), stock)
    except BindError as error:
        assert strict
        text = str(error.reason)
    fd_fusion.unbind(model)
    return {"text": text, "raised": strict}


def every_forward_raises():
    return [raises_in(which, strict) for which in (1, 2, 3) for strict in (False, True)]


def raises_inside(example, ranks):
    """In layer 1 of the first stock forward, once, after two of its six all-reduces, on these ranks."""
    model = build()
    stock, linear, armed = model(X), model.layers[1].self_attn.o_proj, [rank in ranks]
    forward = linear.forward

    def out_of_memory(x):
        if armed[0]:
            armed[0] = False
            raise MemoryError("on purpose")
        return forward(x)

    linear.forward, found = out_of_memory, []
    for turn in range(3):
        try:
            if not turn:
                config = FusionConfig(timeout_s=1, max_token_num=8)
                report = fd_fusion.bind(model, config, example=(lambda: (model(X),)) if example else None)
                if example:
                    found.append("bound")
            out = model(X)
            found.append("right" if paddle.allclose(out, stock, rtol=1e-5, atol=1e-6) else "wrong numbers")
        except FusionError as error:
            found.append(f"{error.reason.code}: {error.reason}")
        except MemoryError as error:
            found.append(str(error))
        if not turn and len(ranks) == 1 and rank in ranks:
            for _ in range(4):  # the others wait in these: a later forward would be paired with them
                paddle.distributed.all_reduce(paddle.zeros([2, H]))
        if example and len(ranks) == 1:
            break  # bind has raised, and nothing is left of it that could hold the caller back
    off = binding._bound.get(model).report.off
    fd_fusion.unbind(model)
    return found, off and off.code, bool((model(X) == stock).all())


def ranks_out_of_step():
    """Each rank's own; what it raised is the caller's where it was the caller's forward."""
    ways = [(example, ranks) for example in (True, False) for ranks in ((size - 1,), tuple(range(size)))]
    found = []
    paddle.distributed.all_gather_object(found, [raises_inside(example, ranks) for example, ranks in ways])
    return found


def stock_does_not_repeat():
    """A stock forward with a spread of its own: said in the report, and what is within it is proven."""
    model, count = build(), []

    def example():
        count.append(None)
        return (model(X) * (1 + 1e-4 * (len(count) % 2)),)

    def spread():
        count.append(None)
        return (model(X) * (1 + 1e-4 * [0, 1, 2][len(count) % 3]),)

    found = {}
    for name, run in (("within", spread), ("stock_repeats", example)):
        count.clear()
        report = fd_fusion.bind(model, CONFIG, example=run)
        found[name] = {"proven": report.proven, "codes": codes(report), "spread": report.spread is not None}
        fd_fusion.unbind(model)
    return found


SCENARIOS = [
    healthy,
    delta_in_place,
    overwritten_in_place,
    reduced_again,
    reader_between,
    reader_after,
    another_tensor,
    hooks,
    a_wrong_order,
    changed_after_bind,
    zeros_then_weights,
    equal_shards,
    no_rows_first,
    nan_in_stock,
    outputs_of_a_kind,
    nothing_finite,
    traced_before_proven,
    every_forward_raises,
    ranks_out_of_step,
    stock_does_not_repeat,
]
found = {}
for scenario in SCENARIOS:
    if not sys.argv[1:] or scenario.__name__ in sys.argv[1:]:
        found[scenario.__name__] = scenario()
        assert not any(state.reaches_layers for state in binding._bound.values())
this.record(**found)
