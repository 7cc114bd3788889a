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


def test_the_fields_of_the_runner_are_restored_too():
    """The host's dummy run writes them, and not every one is written again before the next step reads it."""
    steps = [None]
    runner = SimpleNamespace(share_inputs={}, forward_meta=None, max_logprobs=20, steps=steps)
    runner.proposer = SimpleNamespace(model_inputs=SimpleNamespace(lens=paddle.to_tensor([3])), forward_meta=None)
    with untouched(runner):
        runner.forward_meta, runner.max_logprobs, runner.real_token_num = object(), None, 2
        runner.proposer.forward_meta, runner.steps = object(), [1]
        runner.proposer.model_inputs.lens.add_(paddle.to_tensor([1]))
        steps.append(1)
    assert vars(runner).keys() == {"share_inputs", "forward_meta", "max_logprobs", "steps", "proposer"}
    assert runner.forward_meta is None and runner.max_logprobs == 20 and runner.proposer.forward_meta is None
    assert runner.steps is steps and steps == [None]
    assert runner.proposer.model_inputs.lens.tolist() == [3]
