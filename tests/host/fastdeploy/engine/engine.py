"""Starts the workers: one shell string, the environment inherited, a process group of its own."""

import os
import signal
import subprocess
import sys

from fastdeploy.utils import llm_logger


class LLMEngine:
    def __init__(self, cfg, num_gpu_blocks_override=None):
        self.cfg = cfg
        self.do_profile = num_gpu_blocks_override is None

    def start(self):
        parallel = self.cfg.parallel_config
        ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../worker/worker_process.py")
        folder = os.environ.get("FD_LOG_DIR", "log")
        arguments = (
            f" --nproc_per_node {ranks} {script}"
            f" --model {self.cfg.model_config.model!s}"
            f" --tensor_parallel_size {parallel.tensor_parallel_size}"
            f" --data_parallel_size {parallel.data_parallel_size}"
            f" --graph_optimization_config '{self.cfg.graph_opt_config.to_json_string()}'"
        )
        flags = {
            "do_profile": self.do_profile,
            "enable_flashinfer_allreduce_fusion": parallel.enable_flashinfer_allreduce_fusion,
        }
        for flag, value in flags.items():
            if value:
                arguments += f" --{flag}"
        command = f"OMP_NUM_THREADS=1 {sys.executable} -u -m paddle.distributed.launch --log_dir {folder}"
        command += arguments + f" 2>{folder}/launch_worker.log"
        llm_logger.info(f"Launch worker service command: {command}")
        self.worker_proc = subprocess.Popen(command, stdout=subprocess.DEVNULL, shell=True, preexec_fn=os.setsid)

    def exit_sub_services(self):
        os.killpg(os.getpgid(self.worker_proc.pid), signal.SIGTERM)
