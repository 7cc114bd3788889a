"""`python examples/bench`."""
