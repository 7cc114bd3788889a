"""The graph whose replays `tune` times, captured by Paddle's own class around a core that only notes."""

from types import SimpleNamespace

from paddle.device.cuda import graphs

from fd_fusion.cli.tune import rank


class Core:
    """What a build for GPUs has in the place of this class."""

    told = None

    @classmethod
    def begin_capture_with_pool_id(cls, place, mode, pool_id):
        cls.told.append(("begin", place))

    @classmethod
    def end_capture(cls):
        cls.told.append("end")
        return SimpleNamespace(replay=lambda: cls.told.append("replay"))


def test_paddle_captures_on_the_rank_s_own_gpu(monkeypatch):
    def place(number):
        return f"GPU {number}"

    monkeypatch.setattr(Core, "told", [])
    monkeypatch.delenv("FLAGS_selected_gpus", raising=False)
    for name, value in {"CoreCUDAGraph": Core, "CUDAPlace": place, "is_compiled_with_cuda": lambda: True}.items():
        monkeypatch.setattr(graphs, name, value)
    paddle = SimpleNamespace(__name__="paddle", CUDAPlace=place, cuda=SimpleNamespace(current_device=lambda: 1))

    replay = rank._graph(paddle, lambda: Core.told.append("call"))
    replay()
    assert Core.told == [("begin", "GPU 1"), *["call"] * rank._CALLS, "end", "replay"]
