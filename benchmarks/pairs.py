"""Measures one workload: both sides in turn, A B A B, and the statistics of the pairs."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.processes import Environment, Worker, WorkerError
from benchmarks.protocol import Workload


@dataclass(frozen=True)
class Settings:
    pairs: int = 5
    seconds: float = 0.3  # a timed stretch has as many calls as fill this
    quick: bool = False
    gpu: bool = False
    memory: bool = True

    @property
    def clock(self) -> str:
        """An accelerator works while the process sleeps: there only wall time counts."""
        return "wall" if self.gpu else "cpu"


def median_of_ratios(above: Sequence[float], below: Sequence[float]) -> float | None:
    """The median of above[i] / below[i] over the pairs; pairs without a denominator drop out."""
    ratios = [a / b for a, b in zip(above, below, strict=True) if b > 0]
    return statistics.median(ratios) if ratios else None


def spread(above: Sequence[float], below: Sequence[float]) -> tuple[float, float] | None:
    """Smallest and largest ratio of a pair."""
    ratios = [a / b for a, b in zip(above, below, strict=True) if b > 0]
    return (min(ratios), max(ratios)) if ratios else None


def relative_difference(ours: Sequence, peers: Sequence) -> float:
    """The largest ||ours - peer|| / ||peer|| over the arrays of a result; inf if shapes differ."""
    import numpy as np

    if [a.shape for a in ours] != [b.shape for b in peers]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, peers, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return float("inf")
        scale = float(np.linalg.norm(b))
        gap = float(np.linalg.norm(a - b))
        worst = max(worst, gap / scale if scale > 0 else (0.0 if gap == 0 else float("inf")))
    return worst


def alternate(
    sides: Sequence[str], whats: dict[str, Sequence[str]], pairs: int
) -> Iterator[tuple[str, str]]:
    """The order of timed stretches: (side, what), sides in turn within each of `whats`."""
    order: list[str] = []
    for side in sides:
        order += [what for what in whats[side] if what not in order]
    for _ in range(pairs):
        for what in order:
            for side in sides:
                if what in whats[side]:
                    yield side, what


def measure(
    workload: Workload,
    ours: Environment,
    peer: Environment | None,
    settings: Settings,
    note: Callable[[str], None] = lambda text: None,
) -> dict:
    """The row of one workload: samples, statistics, verdicts; or its `skipped` or `error`."""
    row: dict = {
        "name": workload.name,
        "peer": peer.name if peer else None,
        "wanted_peer": workload.peer,
        "rtol": workload.rtol,
        "x64": workload.x64,
        "sides": {},
    }
    environments = {"ours": ours} | ({"peer": peer} if peer else {})
    try:
        with ExitStack() as stack:
            workers = {
                side: stack.enter_context(Worker(env, x64=workload.x64, gpu=settings.gpu))
                for side, env in environments.items()
            }
            if workload.requires and ours.ours:
                missing = workers["ours"].ask("missing", modules=list(workload.requires))["missing"]
                if missing:
                    return row | {"skipped": f"needs {', '.join(missing)}"}
            whats = _prepare(workload, workers, row, settings, note)
            _time(workers, whats, row, settings, note)
            _compare(workers, row)
        if row.pop("compiles") and any(t.metric == "compile_ratio" for t in workload.targets):
            _compile(workload, environments, row, settings, note)
        if settings.memory and workload.memory:
            for side, env in environments.items():
                for what in whats[side]:
                    note(f"{side} memory of {what}")
                    row["sides"][side][what]["memory"] = _memory(workload, env, what, settings)
    except WorkerError as error:
        return row | {"error": str(error)}
    row["statistics"] = statistics_of(row, settings.clock)
    # A target holds for the full shapes: at the quick ones the overhead of a call is measured.
    row["targets"] = [] if settings.quick else verdicts(workload, row["statistics"])
    return row


def _prepare(workload, workers, row, settings, note) -> dict[str, list[str]]:
    """Builds and compiles both sides; returns which calls each of them offers."""
    whats = {}
    for side, worker in workers.items():
        note(f"{side} builds")
        try:
            has = worker.ask(
                "build", module=workload.module, name=workload.name, quick=settings.quick
            )["has"]
            whats[side] = ["run", *[what for what in has if what == "forward"]]
            row["compiles"] = "compile" in has
            row["sides"][side] = {"about": worker.ask("about")}
            for what in [*whats[side], *[w for w in has if w == "memory_baseline"]]:
                timing: dict = {"first": None, "calls": 1, "wall": [], "cpu": []}
                row["sides"][side][what] = timing
                if what == "run" and "measure" in has:
                    continue
                timing["first"] = worker.ask("first", what=what)
                timing |= worker.ask("calls", what=what, seconds=settings.seconds)
        except WorkerError as error:
            raise WorkerError(f"{side}: {error}") from None
    if "peer" in whats and "memory_baseline" in row["sides"]["peer"]:
        del row["sides"]["peer"]["memory_baseline"]
    if "memory_baseline" in row["sides"]["ours"]:
        whats["ours"].append("memory_baseline")
    return whats


def _time(workers, whats, row, settings, note) -> None:
    for number, (side, what) in enumerate(alternate(list(workers), whats, settings.pairs)):
        note(f"stretch {number + 1}: {side} {what}")
        samples = row["sides"][side][what]
        sample = workers[side].ask("time", what=what, calls=samples["calls"])
        samples["wall"].append(sample["wall"])
        samples["cpu"].append(sample["cpu"])


def _compile(workload, environments, row, settings, note) -> None:
    """Compilation alone, each time in a process of its own, sides in turn."""
    for number in range(settings.pairs):
        for side, env in environments.items():
            note(f"compilation {number + 1}: {side}")
            with Worker(env, x64=workload.x64, gpu=settings.gpu) as worker:
                worker.ask(
                    "build", module=workload.module, name=workload.name, quick=settings.quick
                )
                timing = worker.ask("first", what="compile")
            samples = row["sides"][side].setdefault("compile", {"wall": [], "cpu": []})
            samples["wall"].append(timing["wall"])
            samples["cpu"].append(timing["cpu"])


def _compare(workers, row) -> None:
    """Relative difference of the two results; of our own alone, only that they are finite."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for side, worker in workers.items():
            path = str(Path(folder) / f"{side}.npz")
            row["shapes"] = worker.ask("result", path=path)["shapes"]
            with np.load(path) as arrays:
                results[side] = [arrays[name] for name in arrays.files]
    if "peer" in results and row["shapes"]:
        row["difference"] = relative_difference(results["ours"], results["peer"])
        row["agrees"] = row["difference"] <= row["rtol"]
    else:
        row["difference"] = None
        row["agrees"] = all(bool(np.isfinite(a).all()) for a in results["ours"])


def _memory(workload: Workload, env: Environment, what: str, settings: Settings) -> dict:
    with Worker(env, x64=workload.x64, gpu=settings.gpu, memory=True) as worker:
        worker.ask("build", module=workload.module, name=workload.name, quick=settings.quick)
        return worker.ask("memory", what=what)


# ---- from samples to figures ------------------------------------------------------------------


def _peak(row: dict, side: str, what: str) -> float | None:
    memory = row["sides"].get(side, {}).get(what, {}).get("memory")
    if not memory:
        return None
    return memory["device"] if memory["device"] is not None else memory["steady"]


def _compile_seconds(side: dict, clock: str) -> float | None:
    """Measured alone, or the first call less a steady one."""
    if "compile" in side:
        return statistics.median(side["compile"][clock])
    samples = side.get("run")
    if not samples or not samples["first"] or not samples[clock]:
        return None
    return max(0.0, samples["first"][clock] - statistics.median(samples[clock]))


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def statistics_of(row: dict, clock: str = "cpu") -> dict:
    """Figures of a row. Ratios peer / ours are above 1 where this package is faster."""
    ours, peer = row["sides"]["ours"], row["sides"].get("peer")
    figures: dict = {"clock": clock, "seconds": statistics.median(ours["run"][clock])}
    figures["wall_seconds"] = statistics.median(ours["run"]["wall"])
    figures["compile"] = _compile_seconds(ours, clock)
    figures["peak_mib"] = _peak(row, "ours", "run")
    figures["forward_seconds"] = figures["over_forward"] = None
    if "forward" in ours:
        figures["forward_seconds"] = statistics.median(ours["forward"][clock])
        figures["over_forward"] = median_of_ratios(ours["run"][clock], ours["forward"][clock])
    figures["peak_over_baseline"] = _ratio(
        figures["peak_mib"], _peak(row, "ours", "memory_baseline")
    )
    if peer:
        figures["peer_seconds"] = statistics.median(peer["run"][clock])
        figures["speedup"] = median_of_ratios(peer["run"][clock], ours["run"][clock])
        figures["speedup_range"] = spread(peer["run"][clock], ours["run"][clock])
        figures["speedup_wall"] = median_of_ratios(peer["run"]["wall"], ours["run"]["wall"])
        figures["peer_compile"] = _compile_seconds(peer, clock)
        figures["compile_ratio"] = _ratio(figures["peer_compile"], figures["compile"])
        figures["peer_peak_mib"] = _peak(row, "peer", "run")
        figures["memory_ratio"] = _ratio(figures["peer_peak_mib"], figures["peak_mib"])
        if "forward" in peer:
            figures["peer_forward_seconds"] = statistics.median(peer["forward"][clock])
            figures["peer_over_forward"] = median_of_ratios(
                peer["run"][clock], peer["forward"][clock]
            )
    return figures


def verdicts(workload: Workload, figures: dict) -> list[dict]:
    return [
        asdict(target)
        | {
            "value": (value := figures.get(target.metric)),
            "met": None if value is None else target.met(value),
        }
        for target in workload.targets
    ]
