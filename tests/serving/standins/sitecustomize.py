"""On the PYTHONPATH of a FastDeploy server: each of its processes runs this when it starts."""

import os

if os.environ.get("SERVING_STAND_INS"):
    import cpu_host

    cpu_host.install()
    # A rank that was not given what the others were, as on the second of two machines.
    if os.environ.get("SERVING_BARE_RANK") == os.environ.get("PADDLE_TRAINER_ID", "none"):
        os.environ.pop("FD_FUSION_CONFIG", None)
