"""A Site of plain functions, in place of a backend's op and a host's layers."""

from types import SimpleNamespace

from fd_fusion.site import Site


def make_site(name="a -> b", *, fused=None, reduce=None, norm=None, limit=1, staying_limit=None, **more):
    """fused: (partial, residual) -> (norm_out, residual_out)."""
    run = lambda partial, residual, *_: fused(partial, residual)  # noqa: E731
    op = SimpleNamespace(limit=limit, staying_limit=staying_limit, finish=run)
    stock = SimpleNamespace(reduce=reduce, norm=norm, weight=lambda: None, numbers=lambda: (1e-6, 0.0))
    return Site(name, op, stock, **more)
