"""A residual that stays with the owners of its rows, by two-shot in whole models: 4 ranks, one start for all scenarios.

Each scenario gets a fresh model, and returns what this rank found.
"""

import dataclasses
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import paddle
from support import rank as this
from support.tiny import DemoDecoder, hidden

import fd_fusion
from fd_fusion.backends import triton
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.tuning import limits

rank, size = this.start()
LIMIT, TWO_SHOT = 8, 3
X = hidden(LIMIT + 3)
CONFIG = fd_fusion.FusionConfig(timeout_s=60, max_token_num=LIMIT, backend="triton")
plans._two_shot_rows = lambda *_: TWO_SHOT
paths, launch = [], triton.TritonOp._launch


def recording(op, kernel, *args):
    paths.extend(path for (_, path, *_), one in op._launches.items() if one is kernel)
    return launch(op, kernel, *args)


triton.TritonOp._launch = recording


def bits(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [one.numpy().tobytes().hex() for one in outputs]


def runs(model, rows):
    """Bits and paths of forwards of several T."""
    found = []
    for count in rows:
        paths.clear()
        out = bits(model(X[:count]))
        found.append((out, "".join(map(str, paths))))
    return found


def each(change=lambda model: None, rows=(5,), example=2):
    """The bits and paths of the model with whatever stays, against the same Sites with two results."""
    model = DemoDecoder(rank, size)
    change(model)
    report = fd_fusion.bind(model, CONFIG, example=(lambda: model(X[:example])) if example else None)
    if not example:
        model(X[:2])
    assert report.proven, report.lines()
    kept = runs(model, rows)
    for line in report.sites:
        line.site._stays = ()
    whole = runs(model, rows)
    fd_fusion.unbind(model)
    facts = report.to_dict()
    return {
        "same": all(a[0] == b[0] for a, b in zip(whole, kept)),
        "whole": [paths for _, paths in whole],
        "paths": [paths for _, paths in kept],
        "staying": facts["staying"],
        "residual": facts["residual"] and facts["residual"]["text"].rpartition(": ")[2],
        "told": sum("reads a residual" in line for line in report.lines()),
    }


def healthy():
    return {"example": each(rows=(1, TWO_SHOT, 5, LIMIT)), "first": each(example=None)}


def aux_hidden_states():
    """A draft model reads the residual behind a layer: it is one of the outputs."""

    def change(model):
        def forward(x):
            residual, aux = None, None
            for layer in model.layers:
                x, residual = layer(x, residual)
                aux = residual if aux is None else aux
            return model.norm(x, residual)[0], aux

        model.forward = forward

    return each(change)


def reading(model, use):
    """Layer 1 computes with `use(residual)`, between its two norms."""
    layer = model.layers[1]

    def forward(x, residual):
        x, residual = layer.input_layernorm(x, residual)
        x, residual = layer.post_attention_layernorm(layer.self_attn(x + use(residual)), residual)
        return layer.mlp(x), residual

    layer.forward = forward


def read_inside():
    """One row of the residual, which one rank owns, and a small change."""
    return each(lambda model: reading(model, lambda residual: 1e-6 * residual[:1]))


def read_in_a_hidden_row():
    """The second row alone is changed, and the example gives the model's token of the last row."""
    model = DemoDecoder(rank, size)
    rest = paddle.zeros([1, 32])
    reading(model, lambda residual: paddle.concat([rest, 1e-6 * residual[1:2], rest, rest]))
    report = fd_fusion.bind(model, CONFIG, example=lambda: model(X[:4])[-1:].argmax(-1))
    out = model(X[:4])
    fd_fusion.unbind(model)
    return [report.to_dict()["staying"], bool(paddle.isnan(out).any())]


def read_by_one_rank():
    """Rank 0 alone reads the last row, which rank 0 owns in the forward of one row that proves."""
    return each(lambda model: reading(model, lambda residual: 0 if rank else 1e-6 * residual[-1:]), example=1)


def no_nan_allowed():
    """A model that raises where the first row holds NaN, though rank 0 owns the first row."""

    def use(residual):
        assert not bool(paddle.isnan(residual[:1]).any()), "NaN"
        return 0

    return each(lambda model: reading(model, use))


def watched():
    """A hook copies the residual that a norm gives; a layer keeps the residual, or is hooked where it gets it."""

    def hooked(kind):
        def change(model):
            layer = model.layers[1]
            if kind == "norm":
                layer.input_layernorm.register_forward_post_hook(lambda _, inputs, out: seen.append(out[1].mean()))
            elif kind == "layer":
                layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].mean()))
            else:
                reading(model, lambda residual: setattr(model, "aux", residual) or 0)

        seen = []
        return each(change)

    return {kind: hooked(kind) for kind in ("norm", "layer", "kept")}


def last_residual():
    """What the last norm leaves is an output: it was never linked."""

    def change(model):
        def forward(x):
            residual = None
            for layer in model.layers:
                x, residual = layer(x, residual)
            return model.norm(x, residual)

        model.forward = forward

    return each(change)


def copying(model):
    layer = model.layers[1]
    stock = layer.forward
    layer.forward = lambda x, residual: stock(x, residual * 1.0)


def two_limits():
    """Sites of a larger limit where the residual stays, behind one whose residual is copied."""
    limits.built_in_limit = lambda *_, stays=False: LIMIT if stays else LIMIT - 3
    model = DemoDecoder(rank, size)
    copying(model)
    counts = LIMIT - 3, LIMIT - 2, LIMIT, LIMIT + 1
    stock = [model(X[:count]) for count in counts]
    config = dataclasses.replace(CONFIG, max_token_num=None)
    report = fd_fusion.bind(model, config, example=lambda: model(X[:2]))
    near = [bool(paddle.allclose(model(X[:count]), one, atol=1e-5)) for count, one in zip(counts, stock)]
    found = [line.site.limit for line in report.sites], [paths for _, paths in runs(model, counts)], near
    fd_fusion.unbind(model)
    return found


def copied():
    """A residual that is copied is whole; one that is changed in place between two norms is seen."""

    def changing(model):
        layer = model.layers[1]
        stock = layer.forward
        layer.forward = lambda x, residual: stock(x, residual.scale_(0.5))

    return {"copied": each(copying), "in_place": each(changing)}


def stock_norm_between():
    """A pair that is stock reads the residual of the Site in front, which comes back whole."""
    return each(
        lambda model: model.layers[1].self_attn.o_proj.register_forward_post_hook(lambda layer, inputs, out: None)
    )


def read_at_other_T():
    """What no proof of two rows can see: it is NaN, never the number that an earlier layer left there."""
    model = DemoDecoder(rank, size)
    reading(model, lambda residual: residual[:1] if residual.shape[0] > 2 else 0)
    report = fd_fusion.bind(model, CONFIG, example=lambda: model(X[:2]))
    out = model(X[:5])
    fd_fusion.unbind(model)
    return [report.to_dict()["staying"], bool(paddle.isnan(out).all())]


def another_norm():
    """A host asks for another norm in one call: it gets the whole residual, with one-shot, two-shot and no fusing."""
    model = DemoDecoder(rank, size)
    report = fd_fusion.bind(model, CONFIG, example=lambda: model(X[:2]))
    sites = [line.site for line in report.sites]
    found = []
    for rows in (2, 5, LIMIT + 3):
        partials = [this.rank_values([rows, 32], rank, seed) for seed in (1, 2)]
        residual = this.rank_values([rows, 32], 0, 9)
        sites[0].hand_over(partials[0])
        _, left = sites[0].finish(partials[0], residual)
        seen = []
        sites[1].hand_over(partials[1])
        sites[1].finish_stock(partials[1], left, lambda total, r: (seen.append(r), (total, r))[1])
        want = residual + sum(this.rank_values([rows, 32], one, 1) for one in range(size))
        owned = [row for row in range(rows) if row % size == rank]
        stays = rows == 5
        nan = paddle.isnan(left).all(axis=-1).numpy().tolist()
        found.append(
            [
                nan == [stays and row not in owned for row in range(rows)],
                bool(paddle.allclose(seen[0], want, atol=1e-5)),
                seen[0].shape == [rows, 32],
            ]
        )
    fd_fusion.unbind(model)
    return found


def through_faults():
    """A forward that raises half way, a reset, the stock path above the limit, three dimensions, to_static."""
    model = DemoDecoder(rank, size)
    stock = model(X)
    report = fd_fusion.bind(model, CONFIG, example=lambda: model(X[:2]))
    before = bits(model(X[:5]))
    hook = model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        model(X[:5])
        raise AssertionError("no error")
    except ZeroDivisionError:
        hook.remove()
    found = [bits(model(X[:5])) == before]
    fd_fusion.reset()
    found += [bits(model(X[:5])) == before, bits(model(X)) == bits(stock)]
    found += [bits(model(X[:6].reshape([2, 3, 32]))) == bits(model(X[:6]))]
    paths.clear()

    def forward(x):
        return model(x)

    traced = paddle.jit.to_static(forward, full_graph=True)
    found += [bits(traced(X[:5])) == before, "".join(map(str, paths))]
    fd_fusion.unbind(model)
    return [*found, bits(model(X)) == bits(stock), report.to_dict()["staying"]]


found = {}
for scenario in (healthy, aux_hidden_states, read_inside, read_in_a_hidden_row, read_by_one_rank, no_nan_allowed, watched, last_residual, copied,
                 stock_norm_between, read_at_other_T, another_norm, two_limits, through_faults):  # fmt: skip
    if not sys.argv[1:] or scenario.__name__ in sys.argv[1:]:
        found[scenario.__name__] = scenario()
this.record(**found)
