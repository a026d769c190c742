"""Many users at the demo: answers, errors, waiting times and the server's memory, as a table.

    python benchmarks/demo_load.py --users 10 50 --seconds 600

A user asks for one of everything (a picture, the perplexity of a text, a continuation, a graph),
reads the answer for some seconds, and asks again. Every user has an address of its own on the
loopback, since the demo limits what one address may ask at a time. The server is a fresh one with
the bundled checkpoints, on the cores that this process may use.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from timing import machine

ROOT = Path(__file__).resolve().parents[1]
PICTURES = sorted((ROOT / "examples" / "pictures").glob("*.*g"))
KINDS = ("classify", "perplexity", "generate", "graph")
TEXT = "The river rises in the hills and flows through the old town to the sea ."
WAIT = 120.0


class User(threading.Thread):
    """Asks until the end, one question at a time."""

    def __init__(
        self, number: int, url: str, functions: dict[str, Any], reads: float, end: float
    ) -> None:
        super().__init__(daemon=True)
        self.random = random.Random(number)
        transport = httpx.HTTPTransport(
            local_address=f"127.0.{1 + number // 250}.{1 + number % 250}"
        )
        self.http = httpx.Client(base_url=f"{url}/gradio_api", transport=transport, timeout=WAIT)
        self.functions, self.reads, self.end = functions, reads, end
        self.seconds: list[tuple[str, float]] = []
        self.errors: Counter[str] = Counter()

    def run(self) -> None:
        time.sleep(self.random.uniform(0, self.reads))
        while time.monotonic() < self.end:
            kind = self.random.choice(KINDS)
            began = time.monotonic()
            try:
                fault = self.ask(kind)
            except Exception as error:  # whatever a user would see fail
                fault = f"{type(error).__name__}: {error}"
            if fault is None:
                self.seconds.append((kind, time.monotonic() - began))
            else:
                self.errors[f"{kind}: {fault[:120]}"] += 1
            pause = self.random.expovariate(1 / self.reads)
            time.sleep(max(0.0, min(pause, self.end - time.monotonic())))

    def ask(self, kind: str) -> str | None:
        """What went wrong with a question, or None."""
        function = self.functions[kind]
        data = dict(function["defaults"])
        if kind == "classify":
            picture = self.random.choice(PICTURES)
            files = {"files": (picture.name, picture.read_bytes(), "image/*")}
            (path,) = self.http.post("/upload", files=files).raise_for_status().json()
            data["picture"] = {"path": path, "meta": {"_type": "gradio.FileData"}}
        elif kind == "graph":
            data["number"] = self.random.randrange(7)  # of the examples
        else:
            data["text"] = TEXT
        session = f"{self.name}-{self.random.random()}"
        body = {
            "data": [data[name] for name in function["names"]],
            "fn_index": function["id"],
            "session_hash": session,
        }
        self.http.post("/queue/join", json=body).raise_for_status()
        until = time.monotonic() + WAIT  # of the answer: the stream itself is kept alive for ever
        with self.http.stream("GET", "/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                if time.monotonic() > until:
                    return f"no answer within {WAIT:.0f} seconds"
                said = json.loads(line[6:]) if line.startswith("data: ") else {}
                if said.get("msg") == "process_completed":
                    return None if said["success"] else str(said["output"].get("error"))
        return "no answer"


def measure(users: int, seconds: float, reads: float) -> dict[str, Any]:
    """Figures of one server under so many users."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        functions = _functions(url)
        before, used = resident(server.pid), processor(server.pid)
        end = time.monotonic() + seconds
        people = [User(number, url, functions, reads, end) for number in range(users)]
        for one in people:
            one.start()
        memory: list[float] = []
        load: list[float] = []
        while time.monotonic() < end:
            time.sleep(1)
            load.append(os.getloadavg()[0])
            if time.monotonic() > end - seconds * (4 - len(memory)) / 5:  # every fifth
                memory.append(resident(server.pid))
        until = time.monotonic() + 2 * WAIT  # of all of them together
        for one in people:
            one.join(max(0.0, until - time.monotonic()))
        asked = [pair for one in people for pair in one.seconds]
        taken = sorted(second for _, second in asked)
        errors = sum((one.errors for one in people), Counter())
        return {
            "users": users,
            "seconds": seconds,
            "seconds_between_questions": reads,
            "answered": len(taken),
            "errors": dict(errors),
            "per_second": round(len(taken) / seconds, 2),
            **{f"p{share}": round(_quantile(taken, share), 1) for share in (50, 95, 99)},
            "p95_by_endpoint": {
                kind: round(_quantile(sorted(s for k, s in asked if k == kind), 95), 1)
                for kind in KINDS
            },
            "rss_mib": [before, *memory, resident(server.pid)],
            "cpu_seconds_per_answer": round((processor(server.pid) - used) / max(len(taken), 1), 2),
            "load_average": round(sum(load) / len(load), 1),
        }
    finally:
        server.terminate()
        server.wait(30)


def _functions(url: str) -> dict[str, Any]:
    """The endpoints of a server that has just been started, with their arguments."""
    for _ in range(1200):
        try:
            config = httpx.get(f"{url}/config", timeout=5).raise_for_status().json()
            break
        except httpx.HTTPError:
            time.sleep(0.5)
    else:
        raise SystemExit("the demo did not start")
    described = httpx.get(f"{url}/gradio_api/info", timeout=60).json()["named_endpoints"]
    numbers = {d["api_name"]: d["id"] for d in config["dependencies"]}
    found = {}
    for kind in KINDS:
        parameters = described[f"/{kind}"]["parameters"]
        found[kind] = {
            "id": numbers[kind],
            "names": [p["parameter_name"] for p in parameters],
            "defaults": {p["parameter_name"]: p.get("parameter_default") for p in parameters},
        }
    return found


def resident(process: int) -> int:
    """Resident memory of a process in MiB (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))


def processor(process: int) -> float:
    """Seconds of processor time that a process has used (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _quantile(taken: list[float], percent: int) -> float:
    return taken[min(len(taken) - 1, len(taken) * percent // 100)] if taken else float("nan")


def table(rows: list[dict[str, Any]]) -> str:
    """The figures in Markdown."""
    lines = [
        "| users | minutes | answered | errors | per s | p50 / p95 / p99 s | p95 by endpoint "
        "| CPU s per answer | RSS MiB: start, by fifths, end | load average of the machine |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['users']} | {row['seconds'] / 60:g} | {row['answered']} "
            f"| {sum(row['errors'].values())} | {row['per_second']} "
            f"| {row['p50']} / {row['p95']} / {row['p99']} "
            f"| {', '.join(f'{k} {v}' for k, v in row['p95_by_endpoint'].items())} "
            f"| {row['cpu_seconds_per_answer']} | {', '.join(map(str, row['rss_mib']))} "
            f"| {row['load_average']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--reads", type=float, default=20.0, help="mean seconds between questions")
    parser.add_argument("--output", type=Path, help="stem of a .json and a .md file")
    arguments = parser.parse_args()
    rows = [measure(users, arguments.seconds, arguments.reads) for users in arguments.users]
    text = table(rows)
    print(text)
    for row in rows:
        for fault, count in row["errors"].items():
            print(f"{row['users']} users: {count} × {fault}")
    if arguments.output is not None:
        content = {"rows": rows, "machine": machine()}
        arguments.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
