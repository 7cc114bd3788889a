"""The host's static graph (`graph_opt_level` 1, SOT), stock and fused: one whole graph, and the same answers.

The host's warm-up ends the server where the graph breaks, or where a second one is made. Then each step runs it.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor

from serving.server import INTERPRETED, KERNELS, Server
from serving.test_answers import PROMPTS, TOKENS, check_truth, sites
from serving.test_roads import number

SIZES = [1, 2, 4]
SOT = {"use_cudagraph": False, "graph_opt_level": 1, "sot_warmup_sizes": SIZES}
ARGS = ["--graph-optimization-config", json.dumps(SOT)]
ENV = {**INTERPRETED, "SOT_LOG_LEVEL": "2"}  # 2: each run of a graph prints the graph


def our_ops(log):
    """How often an op of ours stands in the graph, for each run of a graph."""
    return [len(re.findall(r"= fd_fusion\.\S+ \(", run)) for run in log.split("start run SIR")[1:]]


def test_stock_and_fused_say_the_truth_by_a_whole_graph(tree, checkpoint, tmp_path):
    """Whether a step is short enough to fuse is decided inside the graph."""
    folder = checkpoint("qwen3")
    for name, config, ops in (("stock", None, 0), ("fused", KERNELS, 6 + 3)):  # Sites, and norms of q and k
        with Server(tree, folder, tmp_path / name, serve=config, env=ENV, args=ARGS) as server:
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                said = pool.map(lambda prompt: server.ask(prompt, TOKENS, timeout_s=150), PROMPTS)
            check_truth(folder, dict(zip(PROMPTS, said)))
            for log in server.worker_logs():
                runs = our_ops(log)
                assert len(runs) >= 2 * len(SIZES) + TOKENS and set(runs) == {ops}
            assert sites(server) == ([6] if config else [])
            if config:
                assert number(server, 'fd_fusion_device_rows_total{backend="triton"}') > 0
