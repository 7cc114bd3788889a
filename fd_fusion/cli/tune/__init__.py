"""`python -m fd_fusion tune`."""
