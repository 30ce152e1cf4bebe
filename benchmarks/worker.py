"""One side of a comparison: a process that builds workloads and times them when asked.

Speaks JSON lines: a request `{"do": NAME, ...}` on standard input, one answer on standard output.
Whatever the packages themselves print goes to standard error (neural-tangents' AUTO prints).
Started by `processes.Worker` with the interpreter of the side's environment.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks import workloads
from benchmarks.protocol import Case, Side


def finish(result: Any) -> Any:
    """Waits for asynchronous results."""
    if "jax" in sys.modules:
        sys.modules["jax"].block_until_ready(result)
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.synchronize()
    return result


def leaves(tree: Any) -> list[Any]:
    """Arrays of a tree of tuples, lists and dicts (any framework's arrays) in a fixed order."""
    if tree is None:
        return []
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    if isinstance(tree, (list, tuple)):
        return [leaf for item in tree for leaf in leaves(item)]
    return [tree]


def to_numpy(leaf: Any):
    import numpy as np

    if "torch" in sys.modules and isinstance(leaf, sys.modules["torch"].Tensor):
        leaf = leaf.detach().cpu()
    return np.asarray(leaf)


def timed(call: Callable[[], Any], calls: int) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        finish(call())
    return {
        "wall": (time.perf_counter() - wall) / calls,
        "cpu": (time.process_time() - cpu) / calls,
    }


# ---- memory of this process -------------------------------------------------------------------


def _status(key: str) -> float | None:
    try:
        with open("/proc/self/status") as lines:
            for line in lines:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def peak_mib() -> float:
    """Highest resident memory so far. Not ru_maxrss on Linux: that one survives exec()."""
    high_water = _status("VmHWM")
    if high_water is None:
        import resource

        unit = 1024**2 if sys.platform == "darwin" else 1024
        high_water = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return high_water


def settle() -> tuple[float | None, bool]:
    """Gives freed memory back and restarts the high-water mark: (resident MiB, restarted)."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as marks:
            marks.write("5")
    except OSError:
        return _status("VmRSS"), False
    return _status("VmRSS"), True


def device_peak_mib() -> float | None:
    """Peak of the accelerator's allocator, where there is one."""
    stats = sys.modules["jax"].local_devices()[0].memory_stats() if "jax" in sys.modules else None
    return stats["peak_bytes_in_use"] / 2**20 if stats else None


# ---- the requests -----------------------------------------------------------------------------


class Session:
    def __init__(self, package: str):
        self.package = package
        self.case: Case | None = None
        self.firsts: dict[str, float] = {}  # wall seconds of each first call
        self.last: Any = None  # the latest result of `run`, for `result`

    def _call(self, what: str) -> Callable[[], Any]:
        call = getattr(self.case, what)
        if call is None:
            raise ValueError(f"the workload has no {what!r}")
        return call

    def about(self) -> dict:
        versions = {}
        for name in {"jax", "jaxlib", "numpy", self.package}:
            try:
                versions[name] = importlib.import_module(name).__version__
            except (ImportError, AttributeError):
                continue
        about = {"python": sys.version.split()[0], "versions": versions}
        if "jax" in sys.modules:
            device = sys.modules["jax"].devices()[0]
            about["device"] = f"{device.platform}: {device.device_kind}"
            if device.platform != "cpu":
                about["device"] += f" ({' '.join(device.client.platform_version.split())})"
        return about

    def missing(self, modules: list[str]) -> dict:
        def there(name: str) -> bool:
            try:
                importlib.import_module(name)
            except ImportError:
                return False
            return True

        return {"missing": [name for name in modules if not there(name)]}

    def build(self, module: str, name: str, quick: bool) -> dict:
        self.drop()
        (workload,) = [w for w in workloads.find(module=module) if w.name == name]
        self.case = workload.case(Side(self.package, quick))
        return {
            "has": [
                what
                for what in ("forward", "memory_baseline", "measure", "compile")
                if getattr(self.case, what) is not None
            ]
        }

    def drop(self) -> dict:
        self.case = self.last = None
        self.firsts = {}
        if "jax" in sys.modules:
            sys.modules["jax"].clear_caches()
        gc.collect()
        return {}

    def first(self, what: str) -> dict:
        timing = timed(self._kept(what), 1)
        self.firsts[what] = timing["wall"]
        return timing

    def _kept(self, what: str) -> Callable[[], Any]:
        call = self._call(what)
        if what != "run":
            return call

        def run() -> Any:
            self.last = None  # two results at once would be more than a user holds
            self.last = call()
            return self.last

        return run

    def calls(self, what: str, seconds: float) -> dict:
        """How many calls fill `seconds`; a slow first call is answer enough (and spares one)."""
        if self.firsts[what] > 20 * seconds:
            return {"calls": 1}
        once = timed(self._call(what), 1)["wall"]
        return {"calls": max(1, min(1000, round(seconds / max(once, 1e-6))))}

    def time(self, what: str, calls: int) -> dict:
        if what == "run" and self.case is not None and self.case.measure is not None:
            wall, cpu = self.case.measure()
            return {"wall": wall, "cpu": cpu}
        return timed(self._kept(what), calls)

    def result(self, path: str) -> dict:
        import numpy as np

        result = self._call("run")() if self.last is None else self.last
        arrays = [to_numpy(leaf) for leaf in leaves(result)]
        np.savez(path, *arrays)
        return {"shapes": [list(a.shape) for a in arrays]}

    def memory(self, what: str) -> dict:
        """Peak memory of the first call (with its compilation) and of later ones.

        first: above the process with the packages imported and the inputs made.
        steady: above the process just before the call, freed memory given back; the median of
          three calls, since the scratch space of library kernels depends on how threads meet.
        """
        call = self._call(what)
        start, _ = settle()
        finish(call())
        if (on_device := device_peak_mib()) is not None:
            return {"first": None, "steady": None, "device": on_device}
        first = None if start is None else peak_mib() - start
        peaks = []
        for _ in range(3):
            before, restarted = settle()
            if not restarted or before is None:
                return {"first": first, "steady": None, "device": None}
            started = time.perf_counter()
            finish(call())
            peaks.append(peak_mib() - before)
            if time.perf_counter() - started > 2:
                break  # so slow a call is large, and its scratch space is not
        return {"first": first, "steady": statistics.median(peaks), "device": None}


def serve(session: Session, requests, answers) -> None:
    for line in requests:
        request = json.loads(line)
        do = request.pop("do")
        try:
            answer = getattr(session, do)(**request)
        except Exception as error:
            traceback.print_exc()
            first_line = (str(error).splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first_line}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    # Keep the pipe for answers alone; print() and C code that writes to fd 1 go to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    config = json.loads(sys.argv[1])
    if config["jax"]:
        import jax

        jax.config.update("jax_enable_x64", config["x64"])
    importlib.import_module(config["package"])
    serve(Session(config["package"]), sys.stdin, answers)


if __name__ == "__main__":
    main()
