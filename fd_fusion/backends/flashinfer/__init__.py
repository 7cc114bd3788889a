"""FlashInfer's kernel as a backend. As of every backend: `supports` and `open`."""

from fd_fusion.backends.flashinfer.backend import open, supports

__all__ = ["open", "supports"]
