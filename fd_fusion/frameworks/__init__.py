"""The one room that tells Paddle from torch: store, device, streams, and how Triton runs for either."""
