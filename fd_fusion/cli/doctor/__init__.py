"""`python -m fd_fusion doctor`."""
