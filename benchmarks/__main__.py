"""Command line of the benchmarks: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import pairs, processes, table, workloads

RESULTS = Path(__file__).resolve().parent / "results"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="SUBSTR", help="workloads with SUBSTR in the name"
    )
    parser.add_argument("--json", metavar="FILE", help="all samples; default benchmarks/results/")
    parser.add_argument("--pairs", type=int, default=None, help="A B pairs (5; 2 with --quick)")
    parser.add_argument(
        "--seconds", type=float, default=None, help="length of a timed stretch (0.3)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all")
    parser.add_argument("--alone", action="store_true", help="this package without its peers")
    parser.add_argument(
        "--gpu", action="store_true", help="this package alone on JAX's default device, wall time"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory processes")
    parser.add_argument("--list", action="store_true", help="names of the workloads, and no more")
    parser.add_argument(
        "--ours",
        metavar="PEER",
        help="put this peer in our place too (its ratio to itself shows the noise)",
    )
    return parser.parse_args(arguments)


def machine() -> dict:
    def read(path: str, key: str) -> str | None:
        try:
            with open(path) as lines:
                return next((x.split(":", 1)[1].strip() for x in lines if x.startswith(key)), None)
        except OSError:
            return None

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = (read("/proc/cpuinfo", "flags") or "").split()
    vectors = next((f for f in ("avx512f", "avx2", "avx") if f in flags), "")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    model = read("/proc/cpuinfo", "model name") or platform.processor()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or "unknown",
        "machine": f"{model} {vectors}, {cores} cores, {platform.system()}",
        "load before the run": ", ".join(f"{x:.1f}" for x in os.getloadavg()),
    }


def versions(row: dict) -> dict:
    found = {}
    for side, entry in row["sides"].items():
        about = entry["about"]
        names = ", ".join(f"{name} {v}" for name, v in sorted(about["versions"].items()))
        device = about.get("device", "")
        label = "ours" if side == "ours" else f"peer {row['peer']}"
        found[label] = f"{names}, Python {about['python']}" + (f", on {device}" if device else "")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    chosen = workloads.find(options.only)
    if options.list:
        print("\n".join(f"{w.name}  [{w.peer or 'alone'}]" for w in chosen))
        return 0
    if not chosen:
        print(f"no workload has {options.only!r} in its name; --list shows them", file=sys.stderr)
        return 2
    alone = options.alone or options.gpu
    settings = pairs.Settings(
        pairs=options.pairs or (2 if options.quick else 5),
        seconds=options.seconds or (0.01 if options.quick else 0.3),
        quick=options.quick,
        gpu=options.gpu,
        memory=not options.no_memory,
    )
    ours = processes.our_environment()
    if options.ours:
        replacement = processes.peer_environment(options.ours)
        if replacement is None:
            print(f"benchmarks/peer/setup {options.ours} has not been run", file=sys.stderr)
            return 2
        ours = replacement

    about, rows = machine(), []
    path = Path(options.json) if options.json else RESULTS / "latest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, workload in enumerate(chosen):

        def note(text: str, name: str = workload.name, number: int = number) -> None:
            if sys.stderr.isatty():
                line = f"[{number + 1}/{len(chosen)}] {name}: {text}"
                print(f"\r{line:100.100}", end="", file=sys.stderr, flush=True)

        peer = None if alone or workload.peer is None else processes.peer_environment(workload.peer)
        row = pairs.measure(workload, ours, peer, settings, note) | {"alone": alone}
        rows.append(row)
        about |= versions(row)
        # After each row, so that an interrupted run leaves what it had.
        path.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
        if sys.stderr.isatty():
            print("\r" + " " * 100 + "\r", end="", file=sys.stderr)
        else:
            print(f"[{number + 1}/{len(chosen)}] {workload.name}", file=sys.stderr)
    page = table.report(about, rows)
    path.with_suffix(".md").write_text(page)
    print(page, end="")
    failed = [row for row in rows if "error" in row or not row.get("agrees", True)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
