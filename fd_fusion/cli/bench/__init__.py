"""`python -m fd_fusion bench`."""
