"""Facts that the FlashInfer backend says yes to, unless a test changes one."""

from fd_fusion.tuning.limits import OpSpec


def spec(**changed):
    plain = {
        "rank": 0,
        "size": 2,
        "hidden_size": 4096,
        "dtype": "bfloat16",
        "weight_dtype": "bfloat16",
        "weight_offset": 0.0,
        "eps": 1e-6,
        "device": "gpu",
        "arch": 90,
        "deterministic": False,
        "max_token_num": None,
        "workspace_bytes": 32 << 20,
        "timeout_s": 30.0,
    }
    return OpSpec(**{**plain, **changed})
