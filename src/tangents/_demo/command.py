"""The command `tangents demo`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--out", type=Path, default=Path("tangents-demo"), help="folder of the report (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and batches")
    parser.add_argument("--quick", action="store_true", help="fewer images, a narrower network")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the demonstration; the exit status."""
    out = arguments.out
    if out.exists() and not out.is_dir():
        print(f"tangents demo: --out {out} is a file: name a folder.", file=sys.stderr)
        return 2
    if arguments.seed < 0:
        print(f"tangents demo: --seed {arguments.seed} must be 0 or more.", file=sys.stderr)
        return 2
    try:
        from tqdm import tqdm

        from tangents._demo import digits, experiment, report
    except ImportError as error:
        print(
            f"tangents demo: {error.name} is not installed: pip install 'tangents[demo]'.",
            file=sys.stderr,
        )
        return 1
    start = time.perf_counter()
    size = experiment.QUICK if arguments.quick else experiment.FULL
    data = digits.load(size.train, size.test, arguments.seed)
    outcome = experiment.run(size, arguments.seed, data, tqdm)
    facts = report.summary(outcome, time.perf_counter() - start)
    page = report.write(outcome, facts, out)
    if arguments.json:
        print(json.dumps({**facts, "report": str(page)}, indent=2))
    else:
        print(f"\n{report.table(facts)}\n\nReport: {page}")
    return 0
