"""Memory as a budget: one place for byte counts, budgets and tile arithmetic."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import numpy as np

MemoryLike: TypeAlias = int | float | str | None

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[_letter] = _UNITS[f"{_letter}ib"] = 1024**_power
    _UNITS[f"{_letter}b"] = 1000**_power

DEFAULT_SHARE = 0.5
"""Share of what a device has free that a dense computation may use when nothing is said."""


def parse_bytes(memory: int | float | str, name: str = "memory") -> int:
    """Bytes of a budget: a number of bytes, or text such as '2GiB', '500 MB'.

    >>> parse_bytes("2GiB")
    2147483648
    """
    if isinstance(memory, bool) or not isinstance(memory, int | float | str):
        raise TypeError(f"{name}={memory!r}: pass bytes or text such as '2GiB'.")
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", memory.lower())
        if match is None or match[2] not in _UNITS:
            raise ValueError(f"{name}={memory!r} is not a size: pass bytes or text such as '2GiB'.")
        memory = float(match[1]) * _UNITS[match[2]]
    if not memory > 0 or math.isinf(memory):
        raise ValueError(f"{name}={memory!r}: a budget is a positive, finite number of bytes.")
    return int(memory)


def format_bytes(count: float) -> str:
    """Bytes as people read them.

    >>> format_bytes(3 * 2**20)
    '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def free_bytes(device: Any = None) -> int:
    """Bytes that `device` (default: JAX's first) has free, as far as it tells."""
    device = jax.local_devices()[0] if device is None else device
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return max(pages, _linux_available())
    return 4 * 1024**3  # a machine that tells nothing: what a small one has


def _linux_available() -> int:
    # MemAvailable counts the page cache, which the free pages alone leave out.
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def resolve_budget(memory: MemoryLike, name: str = "memory") -> int:
    """The budget in bytes: what was asked for, or `DEFAULT_SHARE` of what is free."""
    return int(DEFAULT_SHARE * free_bytes()) if memory is None else parse_bytes(memory, name)


def chunk_size(total: int, bytes_each: float, budget: int) -> int:
    """How many of `total` items of `bytes_each` fit in `budget`: at least one, at most all."""
    if total <= 0:
        return 0
    return int(np.clip(budget // max(bytes_each, 1), 1, total))


def chunks(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` items; the last one may be ragged.

    >>> list(chunks(5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for start in range(0, total, max(size, 1)):
        yield slice(start, min(start + size, total))
