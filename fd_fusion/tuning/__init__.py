"""Up to how many rows fusing wins: the built-in limits, and the table that `tune` measured."""
