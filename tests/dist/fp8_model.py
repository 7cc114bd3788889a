"""A model whose norms are quantised, bound on two ranks: what reaches its FP8 linears, fused and not. argv: backend."""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import paddle
from paddle import nn
from support import rank as this
from support.values import wide

import fd_fusion
from fd_fusion import Fp8, Fp8Linear, RMSNorm, RowParallelLinear, reference
from fd_fusion.frameworks import paddle_fp8
from fd_fusion.frameworks.tensors import bytes_of

H, LIMIT = 256, 3
FORMS = (Fp8("divide"), Fp8(), Fp8("multiply_pow2", by_column=True, keeps_norm=False))


class Model(nn.Layer):
    def __init__(self, rank, size):
        super().__init__()
        self.norms = nn.LayerList([RMSNorm(H, dtype="bfloat16", quantised=form) for form in FORMS])
        self.up = nn.LayerList([Fp8Linear(H, 128, dtype="bfloat16") for _ in range(2)])
        self.down = nn.LayerList([RowParallelLinear(128 * size, H, dtype="bfloat16") for _ in range(2)])
        for number, (up, down) in enumerate(zip(self.up, self.down)):
            weight = wide(this.rank_values([128, H], rank, seed=number)).astype(np.float32)
            codes, scales = reference.quantise(weight, "multiply")
            up.weight.set_value(paddle.to_tensor(codes).view("float8_e4m3fn"))
            up.weight_scale_inv.set_value(scales.max(axis=0, keepdims=True) / 16)
            down.weight.set_value(this.rank_values([128, H], rank, seed=9 + number, dtype="bfloat16"))

    def forward(self, x):
        """x [T, H] -> the value of the last codes, the residual; `seen` holds what each norm gave."""
        self.seen, residual = [], None
        for number, norm in enumerate(self.norms):
            out, residual = norm(x, residual)
            self.seen.append(out)
            x = self.down[number](self.up[number](out)) if number < 2 else paddle_fp8.values(*out[1:])
        return x, residual


rank, size = this.start()
backend = sys.argv[1]
model = Model(rank, size)
x = this.rank_values([5, H], 0, seed=77, dtype="bfloat16")
stock = model(x)
config = {"backend": backend, "max_token_num": LIMIT, "timeout_s": 20}
report = fd_fusion.bind(model, config, example=lambda: model(x[:2]))
assert report.proven and len(report.sites) == 2, report.lines()
in_kernel = backend == "triton"
assert [site["fp8"] for site in report.to_dict()["sites"]] == (
    ["multiply", "multiply_pow2"] if in_kernel else ["apart", "apart"]
)
told = [line for line in report.lines() if "2 norms quantised behind the kernel: the paddle backend" in line]
assert len(told) == (not in_kernel), report.lines()

op, calls = report.sites[0].selected.op, []
if in_kernel:
    run = op.finish_fp8
    op.finish_fp8 = lambda *args: calls.append(args[-1]) or run(*args)
for got, want in zip(model(x), stock):
    assert (got == want).all(), "above the limit it is stock, bit for bit"
assert not calls
bits = hashlib.sha256()
first = None
for rows in (1, LIMIT):
    before = report.sites[0].calls["fused"]
    value, residual = model(x[:rows])
    assert report.sites[0].calls["fused"] == before + 1
    _, middle, last = model.seen
    want = reference.quantise(wide(middle.norm).astype("f4"), "multiply")
    np.testing.assert_array_equal(bytes_of(middle.codes), want[0])
    np.testing.assert_array_equal(middle.scales.numpy(), want[1])
    assert last.norm is None
    norm = reference.rms_norm(wide(residual), np.ones(H), eps=1e-5)
    assert np.abs(wide(value) - norm).max() <= 2.0**-3 * np.abs(norm).max(), "e4m3 and a power of two"
    for tensor in (last.codes, last.scales.contiguous(), residual):
        bits.update(np.ascontiguousarray(tensor.astype("float32").numpy()).tobytes())
    first = first if first is not None else value
    assert (value[:1] == first).all(), "the same bits for every T"
    for got, want in zip((value, residual), stock):
        near = np.abs(wide(got) - wide(want[:rows])).max() <= 0.15 * np.abs(wide(want)).max()
        assert near, "near the stock model"
assert calls == ([*FORMS[1:]] * 2 if in_kernel else [])
kept = model.norms[1].site.finish_fp8
fd_fusion.unbind(model)
for got, want in zip(model(x), stock):
    assert (got == want).all()
try:
    kept(x, None, FORMS[1], None)
    raise AssertionError("a Site of an unbound model finished")
except fd_fusion.FusionError as error:
    assert error.reason.code == "closed"
this.record(bits=bits.hexdigest())
