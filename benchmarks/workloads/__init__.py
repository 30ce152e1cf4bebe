"""The workloads: every module here with a list `WORKLOADS`. Dropping a file in adds its rows."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

from benchmarks.protocol import Workload


def modules() -> list[str]:
    return sorted(f"{__name__}.{info.name}" for info in pkgutil.iter_modules(__path__))


def find(only: str = "", module: str | None = None) -> list[Workload]:
    """Workloads whose name contains `only`, in the order of the files."""
    names = modules() if module is None else [module]
    found = [
        replace(workload, module=name)
        for name in names
        for workload in importlib.import_module(name).WORKLOADS
    ]
    duplicated = {w.name for w in found if [v.name for v in found].count(w.name) > 1}
    if duplicated:
        raise ValueError(f"workloads: two workloads have the name {sorted(duplicated)[0]!r}.")
    return [workload for workload in found if only in workload.name]
