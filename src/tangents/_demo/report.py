"""The report: a folder with one self-contained page and its pictures, complete or not there."""

from __future__ import annotations

import base64
import contextlib
import os
import platform
import shutil
import signal
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jinja2

import tangents
from tangents._core.memory import format_bytes
from tangents._demo import figures
from tangents._demo.experiment import Outcome

PAGE = resources.files("tangents._demo").joinpath("page.html")


def summary(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """What `--json` prints and the page shows: numbers and versions."""
    return {
        "tangents": tangents.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "seed": outcome.seed,
        "train": outcome.size.train,
        "test": outcome.size.test,
        "width": outcome.size.width,
        "seconds": seconds,
        "subsets": outcome.size.subsets,
        "rows": [
            {
                "name": row.name,
                "accuracy": row.accuracy,
                "seconds": row.seconds,
                "peak_bytes": row.peak,
                "curve": row.curve,
            }
            for row in outcome.rows
        ],
    }


def table(facts: dict[str, Any]) -> str:
    """The rows as text."""
    width = max(len(row["name"]) for row in facts["rows"])
    head = f"{'method':<{width}}  accuracy  seconds  peak memory"
    lines = [head, "-" * len(head)]
    lines += [
        f"{row['name']:<{width}}  {100 * row['accuracy']:6.1f} %  {row['seconds']:7.1f}  "
        f"{format_bytes(row['peak_bytes']):>11}"
        for row in facts["rows"]
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits: five renames are all done or none."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def write(outcome: Outcome, facts: dict[str, Any], out: Path) -> Path:
    """Write pictures and page into a hidden folder in `out` first, then move them into place."""
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    try:
        pictures = []
        for name, (title, _) in figures.FIGURES.items():
            path = scratch / f"{name}.png"
            figures.draw(outcome, name, path)
            pictures.append({"title": title, "data": base64.b64encode(path.read_bytes()).decode()})
        rows = [{**row, "peak_text": format_bytes(row["peak_bytes"])} for row in facts["rows"]]
        page = jinja2.Template(PAGE.read_text("utf-8"), autoescape=True).render(
            facts=facts, rows=rows, pictures=pictures
        )
        (scratch / "report.html").write_text(page, encoding="utf-8")
        with _uninterrupted():
            for name in [*(f"{name}.png" for name in figures.FIGURES), "report.html"]:
                os.replace(scratch / name, out / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out / "report.html"
