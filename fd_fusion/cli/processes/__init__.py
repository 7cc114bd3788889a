"""Ranks as processes of a command, and the signals around them."""
