"""Whether the host runs in its batch-invariant mode."""

from fastdeploy import envs


def is_batch_invariant_mode_enabled():
    return bool(envs.FD_DETERMINISTIC_MODE)
