"""The only folder that knows Paddle from torch: ops, tensors, store, device, streams, and how Triton is launched."""
