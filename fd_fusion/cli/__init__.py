"""The commands of `python -m fd_fusion`."""
