"""The client of compare_serving.sh: loads an OpenAI-compatible server, and compares two such runs.

Standard library only. Throughput is output tokens a second over all requests; TTFT is the time from sending a request
to its first piece of text. Temperature 0: what fusion may change is the rounding of a sum, so a text may part ways
where two tokens are almost equally likely; the report counts such texts and says where the first one parts.
"""

import argparse
import datetime
import http.client
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

TOPICS = ("a lighthouse", "the tides", "a chess game", "bread", "a comet", "the number seven", "an old map", "rain")
FORMS = ("Explain", "Write four lines about", "List five facts about", "Tell a short story about", "Summarise")


def main() -> int:
    args = _parser().parse_args()
    return args.run(args)


def prompts(count: int) -> list[str]:
    """The same list in every run."""
    return [f"{FORMS[i % len(FORMS)]} {TOPICS[i // len(FORMS) % len(TOPICS)]}. ({i})" for i in range(count)]


def measure(args: argparse.Namespace) -> int:
    address = urllib.parse.urlsplit(args.url)
    if not wait_until_up(address, args.pid, args.start_s):
        print(f"compare_serving: no answer from {args.url}/health", file=sys.stderr)
        return 1
    runs = {}
    for concurrency in map(int, args.concurrency.split(",")):
        count = max(args.requests, concurrency)
        load(address, prompts(min(count, concurrency)), concurrency, 8)  # warm: graphs, caches
        runs[concurrency] = load(address, prompts(count), concurrency, args.max_tokens)
    with open(args.out, "w") as file:
        json.dump(runs, file)
    return 0


def wait_until_up(address: urllib.parse.SplitResult, pid: int | None, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if pid is not None and not os.path.exists(f"/proc/{pid}"):
            return False
        try:
            connection = http.client.HTTPConnection(address.hostname, address.port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return True
        except OSError:
            pass
        time.sleep(0.5)
    return False


def load(address: urllib.parse.SplitResult, texts: list[str], concurrency: int, max_tokens: int) -> dict:
    """Send all prompts, `concurrency` at a time. Raises for a request that fails: a comparison needs all of them."""
    start = time.monotonic()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda text: ask(address, text, max_tokens), texts))
    seconds = time.monotonic() - start
    ttft = sorted(answer["ttft_ms"] for answer in answers)
    return {
        "requests": len(texts),
        "tokens_per_s": sum(answer["tokens"] for answer in answers) / seconds,
        "ttft_ms": {"p50": statistics.median(ttft), "p99": ttft[int(0.99 * (len(ttft) - 1))]},
        "texts": [answer["text"] for answer in answers],
    }


def ask(address: urllib.parse.SplitResult, text: str, max_tokens: int) -> dict:
    """One streamed chat completion: its text, its number of tokens, the time to its first text."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "seed": 0,
        "max_tokens": max_tokens,
    }
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=600)
    start, first, pieces, tokens = time.monotonic(), None, [], None
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read(300)!r}")
    for line in response:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line[6:])
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            piece = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
            if piece:
                first = first or time.monotonic()
                pieces.append(piece)
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    if first is None:
        raise RuntimeError(f"no text for {text!r}")
    return {"text": "".join(pieces), "tokens": tokens or len(pieces), "ttft_ms": 1000 * (first - start)}


def report(args: argparse.Namespace) -> int:
    with open(args.off) as off, open(args.on) as on, open(args.said) as said:
        runs, lines = {"off": json.load(off), "on": json.load(on)}, said.read().splitlines()
    rows = [compare(concurrency, runs["off"][concurrency], runs["on"][concurrency]) for concurrency in runs["off"]]
    result = {
        "model": args.model,
        "tensor_parallel_size": args.tp,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": _output("nvidia-smi", "--query-gpu=name,power.limit,driver_version", "--format=csv,noheader"),
        "host": platform.machine(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "command": "examples/compare_serving.sh",
        "fusion_said": lines,
        "rows": rows,
    }
    with open(args.out, "w") as file:
        json.dump(result, file, indent=1)
    print("\n".join([*lines, table(rows), f"written to {args.out}"]))
    return 0


def compare(concurrency: str, off: dict, on: dict) -> dict:
    """One row; `speedup` below 1 is a loss, and is shown like any other."""
    pairs = list(zip(off["texts"], on["texts"], strict=True))
    parted = [common_length(*pair) for pair in pairs if pair[0] != pair[1]]
    return {
        "concurrency": int(concurrency),
        "requests": off["requests"],
        "tokens_per_s": {"off": off["tokens_per_s"], "on": on["tokens_per_s"]},
        "speedup": on["tokens_per_s"] / off["tokens_per_s"],
        "ttft_ms": {"off": off["ttft_ms"], "on": on["ttft_ms"]},
        "same_texts": len(pairs) - len(parted),
        "first_parts_at_character": min(parted) if parted else None,
    }


def common_length(one: str, other: str) -> int:
    """How many characters both start with."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def table(rows: list[dict]) -> str:
    lines = [
        "| concurrency | tokens/s off | on | speedup | TTFT p50 ms off | on | same texts |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed, ttft = row["tokens_per_s"], row["ttft_ms"]
        lines.append(
            f"| {row['concurrency']} | {speed['off']:.1f} | {speed['on']:.1f} | {row['speedup']:.3f} "
            f"| {ttft['off']['p50']:.1f} | {ttft['on']['p50']:.1f} | {row['same_texts']}/{row['requests']} |"
        )
    return "\n".join(lines)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(required=True)
    one = steps.add_parser("measure", help="load one server")
    one.set_defaults(run=measure)
    one.add_argument("--url", required=True)
    one.add_argument("--pid", type=int, help="give up when this process has gone")
    one.add_argument("--start-s", type=float, default=1800, help="how long the server may take to come up")
    one.add_argument("--concurrency", default="1,8,64")
    one.add_argument("--requests", type=int, default=128)
    one.add_argument("--max-tokens", type=int, default=256)
    one.add_argument("--out", required=True)
    two = steps.add_parser("report", help="compare two measurements")
    two.set_defaults(run=report)
    for name in ("--off", "--on", "--said", "--out", "--model", "--tp"):
        two.add_argument(name, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
