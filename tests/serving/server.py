"""A FastDeploy server on CPUs: started, asked, looked into, and ended with all its processes."""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from serving.kinds import HOST_ARGS, HOST_ENV

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
READY_S = 150
KERNELS = {"backend": "triton", "max_token_num": 8}  # a fusion config: longer prompts stay stock
INTERPRETED = {"TRITON_INTERPRET": "1"}  # the environment that KERNELS need on a CPU
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_ports = iter(range(11000 + os.getpid() % 500 * 20, 32000, 20))  # outgoing connections use the ones above


class Server:
    """`serve` is the fusion config for `fd_fusion serve`, or None for the host's own api server.

    The folder of `model` has the name of its kind.
    """

    def __init__(self, tree, model, folder, *, serve=None, ranks=2, env=None, args=()):
        ctypes.CDLL(None).prctl(_SUBREAPER, 1)  # what loses its parent comes to us, so that `_family` finds it
        self.folder, self.ranks, self.kind = Path(folder), ranks, Path(model).name
        self.log = self.folder / "log"
        self.log.mkdir(parents=True)
        self.port = next(port for port in _ports if all(map(_is_free, range(port, port + 4))))
        how = ["fastdeploy.entrypoints.openai.api_server"]
        if serve is not None:
            how = ["fd_fusion", "serve", "--fusion-config", json.dumps(serve)]
        args = [*_arguments(model, self.port, ranks), *HOST_ARGS.get(self.kind, ()), *args]
        command = [sys.executable, "-W", "ignore", "-m", *how, *args]
        self._started = time.time()
        with open(self.folder / "server.out", "w") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                cwd=self.folder,
                start_new_session=True,
                env={**_environment(tree, self.log, ranks), **HOST_ENV.get(self.kind, {}), **(env or {})},
            )

    def __enter__(self):
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error):
        self.stop()

    def wait_ready(self):
        """Until it answers. Fails with the ends of its logs when it died, or after READY_S."""
        while time.time() - self._started < READY_S:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}\n{self.tails()}"
            if self._get("/health") is not None:
                return
            time.sleep(0.5)
        raise AssertionError(f"not ready in {READY_S} s\n{self.tails()}")

    def ask(self, prompt, tokens=24, timeout_s=60):
        """The words of a greedy answer. Raises OSError when the connection is lost, or the server says an error."""
        with self._post(prompt, tokens, timeout_s) as answer:
            return json.load(answer)["choices"][0]["message"]["content"].split()

    def stream(self, prompt, tokens, timeout_s=60):
        """Yield (time, word) as the words come."""
        for line in self._post(prompt, tokens, timeout_s, stream=True):
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:]).get("choices")
                for word in ((choices[0]["delta"].get("content") or "") if choices else "").split():
                    yield time.monotonic(), word

    def _post(self, prompt, tokens, timeout_s, **more):
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
        body |= {"temperature": 0, "top_p": 0, "seed": 1, **more}
        url, kind = f"http://127.0.0.1:{self.port}/v1/chat/completions", {"Content-Type": "application/json"}
        return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), kind), timeout=timeout_s)

    def metrics(self):
        return self._get("/metrics", self.port + 1) or ""

    def fusion_log(self):
        """All that any rank said in fd_fusion.log."""
        return self.log_of("fd_fusion.log")

    def log_of(self, name):
        files = {path.resolve() for path in self.log.rglob(f"{name}*")}  # one is a link to the file of the day
        return "".join(path.read_text() for path in sorted(files))

    def out(self):
        return (self.folder / "server.out").read_text(errors="replace")

    def worker_logs(self):
        """What each rank's stdout and stderr hold, by rank. (In a subfolder in newer versions.)"""
        found = {path.name: path for path in self.log.rglob("workerlog.*")}
        return [found[f"workerlog.{rank}"].read_text(errors="replace") for rank in range(self.ranks)]

    def workers(self):
        """The process of each rank, by rank."""
        found = {}
        for process in self._of_workers():
            if "paddle.distributed.launch" not in _command(process):
                with contextlib.suppress(psutil.Error):
                    found[int(process.environ()["PADDLE_TRAINER_ID"])] = process
        return [found[rank] for rank in range(self.ranks)]

    def is_down(self):
        """Whether no rank and no launcher is left, and the server has ended, or at least has closed its port.

        The stock server's own parent now and then hangs in its very last step, where it ends a ZMQ context from which
        a thread of its own still receives (engine/common_engine.py, _exit_sub_services).
        """
        closed = "Shutting down: Master" in self.out() and not _listens(self.port)
        return self.has_no_ranks() and (closed or self.process.poll() is not None)

    def has_no_ranks(self):
        """Whether no rank and no launcher of it is left."""
        return not self._of_workers()

    def _of_workers(self):
        return [process for process in self.processes() if "worker_process.py" in _command(process)]

    def tails(self, lines=30):
        logs = [self.folder / "server.out", *sorted(self.log.rglob("workerlog.*"))]
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-lines:]) for log in logs)

    def processes(self):
        """All that this server has started and that still runs. (Only servers are started by this suite.)"""
        return [process for process in _family() if _runs(process)]

    def stop(self):
        """End it as an operator does, then whatever is left."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(3)
        for process in _family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(_family(), timeout=5)
        self.process.wait()
        ports = {str(self.port + i) for i in range(4)}
        for left in Path("/dev/shm").iterdir():  # a server that was killed leaves sockets and signals, by its ports
            if ports & set(re.findall(r"\d+", left.name)):
                left.unlink(missing_ok=True)

    def _get(self, path, port=None):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port or self.port}{path}", timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            return None


def _family():
    return psutil.Process().children(recursive=True)


def _command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_free(port):
    with socket.socket() as one:
        try:
            one.bind(("", port))  # one that is used for an outgoing connection is not free either
        except OSError:
            return False
        return True


def _listens(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _arguments(model, port, ranks):
    values = {
        "model": model,
        "port": port,
        "metrics-port": port + 1,
        "engine-worker-queue-port": port + 2,
        "cache-queue-port": port + 3,
        "tensor-parallel-size": ranks,
        "max-model-len": 512,
        "max-num-seqs": 4,
        "max-num-batched-tokens": 512,
        "num-gpu-blocks-override": 40,
        "gpu-memory-utilization": 0.5,
        "graph-optimization-config": '{"use_cudagraph": false}',
        "workers": 1,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _environment(tree, log, ranks):
    stand_ins = f"{HERE / 'standins'}{os.pathsep}{tree}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FD_", "PADDLE_"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": stand_ins,
        "SERVING_STAND_INS": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(ranks))),
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "1",
        "PADDLE_DISTRI_BACKEND": "gloo",
        "FD_LOG_DIR": str(log),
        # The roads of the host that need no further compiled op.
        "FD_USE_GET_SAVE_OUTPUT_V1": "1",
        "FD_SiluAndMul_USE_PHI_SWIGLU": "1",
        "FD_SAMPLING_CLASS": "base",
        "FD_ENABLE_TOP_P_ONE_OPT": "0",
    }
