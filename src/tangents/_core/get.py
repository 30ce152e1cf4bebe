"""The argument `get`: which kernels are asked for, and the named tuple they come back in."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Get: TypeAlias = str | Sequence[str] | None


def canonical_get(get: Get) -> str | tuple[str, ...] | None:
    """Lower-case names: `None` for everything, a string for one kernel, a tuple for several.

    Raises:
        ValueError: if `get` is empty or names a kernel twice.
    """
    if get is None:
        return None
    if isinstance(get, str):
        return get.lower()
    if not isinstance(get, Iterable) or not all(isinstance(name, str) for name in get):
        raise TypeError(f"get={get!r} must be a name, a tuple of names, or None for everything.")
    names = tuple(name.lower() for name in get)
    if not names:
        raise ValueError('"get" must be non-empty.')
    if len(set(names)) < len(names):
        raise ValueError(f'All entries in "get" must be unique. Got {tuple(get)}.')
    return names


@functools.cache
def named_tuple(name: str, fields: tuple[str, ...]) -> type:
    """The named tuple class of these fields: one class each, so that types compare equal."""
    return collections.namedtuple(name, fields)


def select(name: str, get: str | tuple[str, ...] | None, values: Mapping[str, Any]) -> Any:
    """What a canonical `get` asks of `values`: one value, or the named tuple `name` of several."""
    if isinstance(get, str):
        return values[get]
    fields = tuple(values) if get is None else get
    return named_tuple(name, fields)(*(values[field] for field in fields))
