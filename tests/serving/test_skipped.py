"""Where no server can be started, the suite says why."""

import pytest

from serving.conftest import why_not


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_servers_can_be_started_here():
    pass
