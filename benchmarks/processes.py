"""Environments and the worker processes in them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peer"


class WorkerError(RuntimeError):
    """The worker answered with an error, died, or did not answer in time."""


@dataclass(frozen=True)
class Environment:
    name: str
    python: str
    package: str
    jax: bool = True

    @property
    def ours(self) -> bool:
        return self.package == "tangents"


def our_environment() -> Environment:
    return Environment("tangents", sys.executable, "tangents")


def peer_environment(name: str) -> Environment | None:
    """The environment that `benchmarks/peer/setup NAME` made, or None if it has not been run."""
    listing = PEERS / f"{name}.txt"
    if not listing.exists():
        known = ", ".join(sorted(p.stem for p in PEERS.glob("*.txt")))
        raise ValueError(f"no peer {name!r}: benchmarks/peer has {known}.")
    python = PEERS / f".venv-{name}" / "bin" / "python"
    if not (PEERS / f".venv-{name}" / "stamp").exists():
        return None
    lines = listing.read_text().splitlines()
    head = dict(line[2:].split(":", 1) for line in lines if line.startswith("# ") and ":" in line)
    jax = any(line.startswith("jax==") for line in lines)
    return Environment(name, str(python), head["package"].strip(), jax)


class Worker:
    """A process of one environment; `worker.ask("time", what="run", calls=3)`."""

    def __init__(
        self,
        environment: Environment,
        *,
        x64: bool = False,
        gpu: bool = False,
        memory: bool = False,
    ):
        self.environment = environment
        path = [str(ROOT)] + ([str(ROOT / "src")] if environment.ours else [])
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        variables["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        if not gpu:
            variables["JAX_PLATFORMS"] = "cpu"
            # The CUDA build of TensorFlow or torch must not take a device either.
            variables["CUDA_VISIBLE_DEVICES"] = ""
        if memory:
            # Every large array is then its own mapping, returned when it is freed: the resident
            # size follows what is alive and not what the allocator keeps for later.
            variables["MALLOC_MMAP_THRESHOLD_"] = "65536"
            variables["MALLOC_TRIM_THRESHOLD_"] = "65536"
        config = {"package": environment.package, "x64": x64, "jax": environment.jax}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [environment.python, "-m", "benchmarks.worker", json.dumps(config)],
            cwd=ROOT,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )

    def ask(self, do: str, *, timeout: float = 900, **arguments: Any) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._post_mortem()) from None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            self._process.kill()
            raise WorkerError(f"no answer to {do!r} in {timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._post_mortem())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _post_mortem(self) -> str:
        code = self._process.wait(timeout=10)
        lines = [line for line in self.log().splitlines() if line.strip()] or ["no message"]
        return f"the process ended with code {code}: {lines[-1]}"

    def log(self) -> str:
        """What the process wrote to standard error."""
        # Not seek and read: the process writes at the same file offset.
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def close(self) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.close()  # the worker's loop ends
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        stdout.close()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
