"""The command `tangents demo`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
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
    if not 0 <= arguments.seed < 2**32:
        print(f"tangents demo: --seed {arguments.seed} must be 0 to 2**32 - 1.", file=sys.stderr)
        return 2
    try:
        with _folder(arguments.out) as out:
            return _compute_and_write(arguments, out)
    except OSError as error:
        print(
            f"tangents demo: --out {arguments.out} cannot be written: {error.strerror}.",
            file=sys.stderr,
        )
        return 2


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """The folder of the report, there and writable before anything is computed.

    Folders made here are taken away again if nothing has been written into them.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
        yield path
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _compute_and_write(arguments: argparse.Namespace, out: Path) -> int:
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
