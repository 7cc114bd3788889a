"""A spec that the FlashInfer backend says yes to, unless a test changes it."""

from fd_fusion.spec import OpSpec


def spec(**changed):
    plain = {"rank": 0, "size": 2, "hidden_size": 4096, "dtype": "bfloat16", "device": "gpu", "arch": 90}
    return OpSpec(**{**plain, **changed})
