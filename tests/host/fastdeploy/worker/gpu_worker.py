"""A worker: a device, a runner, and the order in which they are brought up."""

from fastdeploy.plugins.model_runner import load_model_runner_plugins

try:
    ModelRunner = load_model_runner_plugins()
except Exception:
    from fastdeploy.worker.gpu_model_runner import GPUModelRunner as ModelRunner


class GpuWorker:
    def __init__(self, fd_config, local_rank, rank):
        self.fd_config, self.local_rank, self.rank = fd_config, local_rank, rank

    def init_device(self):
        self.model_runner = ModelRunner(
            self.fd_config, device="cpu", device_id=0, rank=self.rank, local_rank=self.local_rank
        )

    def load_model(self):
        self.model_runner.load_model()

    def determine_available_memory(self):
        self.model_runner.profile_run()
        return 1

    def initialize_cache(self, num_gpu_blocks):
        self.model_runner.initialize_kv_cache()

    def graph_optimize_and_warm_up_model(self):
        self.model_runner.capture_model()

    def execute_model(self, model_forward_batch=None, num_running_request=None):
        return self.model_runner.execute_model(model_forward_batch)
