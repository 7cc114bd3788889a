"""A server with the api server's surface: /health, and streamed chat completions that depend on the prompt alone."""

import argparse
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--model")
parser.add_argument("--tensor-parallel-size")
parser.add_argument("--delay-ms", type=float, default=1.0)
parser.add_argument("--parts-ways", action="store_true", help="one text ends in another way")
args = parser.parse_args()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = f"you said: {request['messages'][0]['content']}".split()[: request["max_tokens"]]
        if args.parts_ways and words[-1] == "(0)":
            words[-1] = "(zero)"
        self.send_response(200)
        self.end_headers()
        for word in words:
            time.sleep(args.delay_ms / 1000)
            self._send({"choices": [{"delta": {"content": f"{word} "}}]})
        self._send({"choices": [], "usage": {"completion_tokens": len(words)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, event):
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128


# Like the task queue's of FastDeploy: never removed, and in the way of the next server.
Path(os.environ.get("SOCKETS", "/dev/shm"), "fd_task_queue_1.sock").touch(exist_ok=False)
logs = Path(os.environ["FD_LOG_DIR"])
(logs / "paddle").mkdir(parents=True)
launcher = logs / "paddle" / "default.gpu.log"
launcher.write_text(f"FD_FUSION_CONFIG={{}} fd_fusion {dict(os.environ)}\n")
(logs / "fd_fusion.log").write_text("INFO report.py: fd_fusion stub: 0 sites\n")
Server(("127.0.0.1", args.port), Handler).serve_forever()
