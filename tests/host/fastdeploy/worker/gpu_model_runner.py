"""Runs the model: profiles, 'captures', steps, and publishes tokens."""

import json
import os

import numpy as np
import paddle

from fastdeploy import envs
from fastdeploy.model_executor.forward_meta import ForwardMeta
from fastdeploy.model_executor.model_loader import get_model_loader
from fastdeploy.utils import llm_logger


class PoolerOutput(list):
    """What a pooling model gives in place of tokens."""


def post_process(sampler_or_pooler_output, model_output, skip_save_output=False):
    """In an older version the tokens leave the process here; a pooling model's output does so in every version."""
    if not skip_save_output:
        _publish(model_output["rank"], sampler_or_pooler_output)


def _publish(rank, tokens):
    if rank == 0:
        with open(os.path.join(envs.FD_LOG_DIR, "tokens.jsonl"), "a") as file:
            file.write(json.dumps(tokens) + "\n")


class InputBatch:
    """What every step reads and moves: by request, by token, and the seeds of the sampler."""

    def __init__(self, vocab_size, requests=4):
        self.input_ids = paddle.full([requests, 1 << 19], 0, dtype="int64")
        self.bad_tokens = paddle.full([requests, vocab_size], -1, dtype="int64")
        self.eos_token_id = paddle.full([1, 1], 0, dtype="int64")
        self.infer_seed = paddle.full([requests, 1], 0, dtype="int64")
        self.seq_lens_this_time_buffer = paddle.full([requests], 0, dtype="int32")
        self.seq_lens_this_time = paddle.full([requests], 0, dtype="int32")
        self.stop_flags = paddle.full([requests, 1], True, dtype="bool")
        self.block_tables = paddle.full([requests, 8], -1, dtype="int32")
        self.top_k_list, self.image_features = [0] * requests, None

    def __getitem__(self, key):
        return getattr(self, key)

    def __setitem__(self, key, value):
        setattr(self, key, value)


class GPUModelRunner:
    def __init__(self, fd_config, device, device_id, rank, local_rank):
        self.fd_config, self.rank = fd_config, rank
        self.parallel_config = fd_config.parallel_config
        self.use_cudagraph = fd_config.graph_opt_config.use_cudagraph
        self.in_capture = False
        self.cache_blocks = None
        self.share_inputs = InputBatch(fd_config.model_config.vocab_size)

    def load_model(self):
        self.model = get_model_loader(self.fd_config.load_config).load_model(self.fd_config)

    def _dummy_run(self, num_tokens, batch_size, in_capturing=False):
        ids = paddle.arange(num_tokens) % self.fd_config.model_config.vocab_size
        for request in range(batch_size):
            self.share_inputs["input_ids"][request, :num_tokens] = 5
            self.share_inputs["seq_lens_this_time_buffer"][request] = num_tokens
            self.share_inputs["stop_flags"][request] = False
            self.share_inputs["block_tables"][request, :1] = request
        self.share_inputs["eos_token_id"][:] = 2
        self.share_inputs["seq_lens_this_time"] = self.share_inputs["seq_lens_this_time_buffer"]
        self.share_inputs["caches"] = [paddle.zeros([1])]
        meta = ForwardMeta(ids, step_use_cudagraph=in_capturing)
        hidden = self.model({"ids_remove_padding": ids}, meta)
        paddle.rand([1], dtype="float32")  # the sampler
        self.share_inputs["infer_seed"].add_(paddle.full([1, 1], 4, dtype="int64"))
        return hidden

    def profile_run(self):
        self._dummy_run(num_tokens=64, batch_size=4)

    def initialize_kv_cache(self):
        self.cache_blocks = 1

    def capture_model(self):
        if not self.use_cudagraph:
            return
        self.in_capture = True
        for size in (2, 1):
            for _ in range(2):
                self._dummy_run(size, size, in_capturing=True)
        self.in_capture = False

    def execute_model(self, rows):
        ids = paddle.to_tensor(np.asarray(rows))
        with paddle.no_grad():
            hidden = self.model({"ids_remove_padding": ids}, ForwardMeta(ids, step_use_cudagraph=True))
            tokens = self.model.compute_logits(hidden).argmax(-1).tolist()
        in_post_process = envs.HOST_PUBLISHES_IN_POST_PROCESS
        output = {"rank": self.parallel_config.tensor_parallel_rank}
        post_process(tokens, output, skip_save_output=not in_post_process)
        if not in_post_process:
            self._save_model_output(output, tokens)
        return tokens

    def _save_model_output(self, model_output_data, sampler_output):
        _publish(model_output_data["rank"], sampler_output)

    def clear_parameters(self):
        for param in self.model.parameters():
            param.get_tensor()._clear()
        llm_logger.info("parameters cleared")

    def update_parameters(self, checkpoint):
        for name, param in self.model.named_parameters():
            param.get_tensor().set(checkpoint[name], paddle.CPUPlace())
