"""A rank that stops in the middle of a forward: the test writes the order, the rank carries it out by itself.

The file SERVING_FAULT holds [rank, phase, signal number]. Attention, which runs in the middle of each layer, asks.
"""

import json
import os


def strike(most_rows):
    """Send this process the signal that was ordered for it. `most_rows` of a request in this step: 1 in decode."""
    path = os.environ.get("SERVING_FAULT")
    if path is None or not os.path.exists(path):
        return
    with open(path) as file:
        rank, phase, number = json.load(file)
    if rank == int(os.environ.get("PADDLE_TRAINER_ID", "-1")) and phase == ("prefill" if most_rows > 1 else "decode"):
        os.rename(path, f"{path}.done")
        os.kill(os.getpid(), number)
