"""FastDeploy's real layers and models, where FASTDEPLOY_SRC names a source tree; the stand-ins are in host/real.py.

FASTDEPLOY_SRC=/path/to/FastDeploy python -m pytest tests/hosts/fastdeploy/test_real.py -rA
"""

import os

import pytest
from support.launch import launch


@pytest.mark.skipif("FASTDEPLOY_SRC" not in os.environ, reason="FASTDEPLOY_SRC names no source tree of FastDeploy")
def test_every_model_on_two_ranks(tmp_path):
    first, second = launch("fastdeploy_real.py", 2, tmp_path, env={"FD_LOG_DIR": str(tmp_path / "fd")})
    assert len(first) == 16 and first == second
