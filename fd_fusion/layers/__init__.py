"""Paddle-native layers, usable with no host: each with or without a Site, in eager mode and under `to_static`."""
