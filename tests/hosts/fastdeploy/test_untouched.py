"""A dummy run of ours leaves the host's runner as it was: what it holds, and what others hold of it."""

from types import SimpleNamespace

import paddle

from fd_fusion.hosts.fastdeploy.untouched import untouched


def test_a_list_that_others_hold_is_restored_too():
    queue, seen, seeds = [1], {"a": 1}, paddle.to_tensor([3])
    runner = SimpleNamespace(share_inputs={"queue": queue, "seen": seen, "seeds": seeds})
    with untouched(runner):
        queue.append(2)
        seen["b"] = 2
        seeds.add_(paddle.to_tensor([1]))
        runner.share_inputs["seeds"], runner.share_inputs["new"] = paddle.to_tensor([9]), 1
    assert runner.share_inputs == {"queue": [1], "seen": {"a": 1}, "seeds": seeds}
    assert runner.share_inputs["queue"] is queue and queue == [1] and seen == {"a": 1} and seeds.tolist() == [3]
