"""On the PYTHONPATH of a FastDeploy server: each of its processes runs this when it starts."""

import os

if os.environ.get("SERVING_STAND_INS"):
    import cpu_host

    cpu_host.install()
