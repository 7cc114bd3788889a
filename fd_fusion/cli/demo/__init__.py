"""`python -m fd_fusion demo`."""
