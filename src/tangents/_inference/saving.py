"""Results in files: arrays by NumPy or Zarr, structure in JSON, nothing that can be executed.

A file is an `.npz` archive, or a directory in Zarr 3 where the path ends in `.zarr` (format 1):

    header      UTF-8 JSON: {"format": 1, "tangents": version, "content": node}; of the `.npz` an
                array of bytes, of the Zarr group its attribute `tangents`
    a0, a1, ... the arrays

A node is a JSON number, string, boolean or null, or an object with one of the keys

    "array": name, "dtype": name       an array of the archive; bfloat16 and the like as raw bytes
    "float": text                      inf, -inf or nan
    "list" | "tuple": [nodes]
    "dict": [[key, node], ...]         keys are strings
    "namedtuple": name, "fields": [[field, node], ...]
    "type": name, "fields": [[field, node], ...]   one of the classes below

Reading never unpickles and never imports what a file names. Of Zarr only version 3 is read: in
version 2 a filter of an array of objects may unpickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tangents._core.get import named_tuple
from tangents._inference.function_space import ODEState
from tangents._inference.gaussian_process import Gaussian
from tangents._inference.regression import KernelRegression
from tangents._inference.solution import Solution
from tangents._inference.spectrum import Spectrum
from tangents._infinite.kernel import Kernel
from tangents._version import __version__

FORMAT = 1
TYPES: dict[str, type] = {
    cls.__name__: cls for cls in (Kernel, KernelRegression, ODEState, Solution, Spectrum)
}
NAMED: dict[str, Any] = {"Gaussian": Gaussian}


def save(path: str | os.PathLike[str], result: Any) -> None:
    """Save a result: arrays, `Kernel`, fitted regressions, spectra, solutions, and trees of them.

    It is written beside `path` and moved into place when complete; whatever interrupts it, nothing
    half-written bears the name or stays behind.

    Args:
        path: of the file; `.npz` is customary and not added. One that ends in `.zarr` becomes a
            directory in Zarr 3, of chunks that other programs can read one at a time.
        result: arrays (such as a dense kernel, `operator.materialise()`), numbers, strings, None,
            `Kernel`, `KernelRegression`, `Spectrum`, `Solution`, `ODEState`, and named tuples,
            tuples, lists and dictionaries of these.

    Raises:
        TypeError: for anything else, such as functions; the message says where it is.
        ImportError: for `.zarr` without zarr: `tangents[zarr]`.

    Examples:
        >>> import tempfile, os, jax.numpy as jnp, tangents
        >>> path = os.path.join(tempfile.mkdtemp(), "kernel.npz")
        >>> tangents.save(path, {"ntk": jnp.eye(2)})
        >>> tangents.load(path)["ntk"].shape
        (2, 2)
    """
    arrays: dict[str, np.ndarray] = {}
    content = _encode(result, arrays, "result")
    header = {"format": FORMAT, "tangents": __version__, "content": content}
    path = os.fspath(path)
    write = _write_zarr if path.endswith(".zarr") else _write_npz
    beside = f"{path.rstrip(os.sep)}.{os.getpid()}.part"
    try:
        write(beside, header, arrays)
        if os.path.isdir(path):
            # A directory that is not empty cannot be replaced in one step.
            aside = f"{beside}.old"
            os.rename(path, aside)
            os.rename(beside, path)
            shutil.rmtree(aside)
        else:
            os.replace(beside, path)
    except BaseException:
        _remove(beside)
        raise


def _write_npz(path: str, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with open(path, "wb") as file:
        np.savez(file, header=text, **arrays)  # pyright: ignore[reportArgumentType]


def _write_zarr(path: str, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    group = _zarr("save").open_group(path, mode="w", zarr_format=3)
    for name, array in arrays.items():
        group.create_array(name, data=array)
    group.attrs["tangents"] = header


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.exists(path):
        os.remove(path)


def _zarr(caller: str) -> Any:
    try:
        import zarr
    except ImportError:
        raise ImportError(
            f"{caller}: a path that ends in .zarr needs zarr: pip install 'tangents[zarr]', or "
            "save to .npz."
        ) from None
    return zarr


def load(path: str | os.PathLike[str]) -> Any:
    """Load what `save` saved, arrays as JAX arrays.

    Raises:
        ValueError: if the file is not of this format, or of a newer version of it. In float32 mode
            float64 arrays are rounded, as everywhere in JAX.
        ImportError: for a Zarr directory without zarr: `tangents[zarr]`.
    """
    path = os.fspath(path)
    foreign = f"load: {path} was not written by tangents.save."
    if os.path.isdir(path):
        zarr = _zarr("load")
        try:
            group = zarr.open_group(path, mode="r", zarr_format=3)
        except FileNotFoundError:
            raise ValueError(foreign) from None
        if "tangents" not in group.attrs:
            raise ValueError(foreign)
        header, read = group.attrs["tangents"], lambda name: np.asarray(group[name][...])
        return _decode(_content(path, header), read)
    with np.load(path, allow_pickle=False) as archive:
        if "header" not in archive:
            raise ValueError(foreign)
        header = json.loads(archive["header"].tobytes().decode())
        return _decode(_content(path, header), archive.__getitem__)


def _content(path: str, header: Any) -> Any:
    if header["format"] > FORMAT:
        raise ValueError(
            f"load: {path} has format {header['format']}, written by tangents "
            f"{header['tangents']}; this version reads up to {FORMAT}."
        )
    return header["content"]


def _encode(value: Any, arrays: dict[str, np.ndarray], where: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else {"float": str(value)}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        host = np.asarray(value)
        if host.dtype == object:
            raise TypeError(f"save: {where} is an array of objects.")
        name, dtype = f"a{len(arrays)}", host.dtype.name
        if host.dtype.kind not in "biufc":
            # bfloat16 and the eight-bit floats: NumPy's format does not know them.
            host = np.ascontiguousarray(host).view(np.uint8 if host.itemsize == 1 else np.uint16)
        arrays[name] = host
        return {"array": name, "dtype": dtype}
    children: Callable[[Any], list] = lambda pairs: [
        [k, _encode(v, arrays, f"{where}.{k}")] for k, v in pairs
    ]
    if type(value).__name__ in TYPES and isinstance(value, TYPES[type(value).__name__]):
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return {"type": type(value).__name__, "fields": children(fields)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        pairs = zip(value._fields, value, strict=True)  # pyright: ignore
        return {"namedtuple": type(value).__name__, "fields": children(pairs)}
    if isinstance(value, list | tuple):
        items = [_encode(v, arrays, f"{where}[{i}]") for i, v in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, dict):
        if not all(isinstance(k, str) for k in value):
            raise TypeError(f"save: {where} is a dictionary whose keys are not all strings.")
        return {"dict": children(value.items())}
    raise TypeError(
        f"save: {where} is a {type(value).__name__}; only data can be saved: arrays, numbers, "
        f"{', '.join(TYPES)}, and tuples, lists and dictionaries of these."
    )


def _decode(node: Any, read: Callable[[str], np.ndarray]) -> Any:
    if not isinstance(node, dict):
        return node
    if "array" in node:
        host = read(node["array"])
        dtype = jnp.dtype(node["dtype"])
        return jnp.asarray(host if host.dtype == dtype else host.view(dtype))
    if "float" in node:
        return float(node["float"])
    if "list" in node:
        return [_decode(v, read) for v in node["list"]]
    if "tuple" in node:
        return tuple(_decode(v, read) for v in node["tuple"])
    if "dict" in node:
        return {k: _decode(v, read) for k, v in node["dict"]}
    fields = {k: _decode(v, read) for k, v in node["fields"]}
    if "namedtuple" in node:
        name = node["namedtuple"]
        cls = NAMED[name] if name in NAMED else named_tuple(name, tuple(fields))
        return cls(**fields)
    if node["type"] not in TYPES:
        raise ValueError(f"load: the file holds a {node['type']!r}, which this version has not.")
    return TYPES[node["type"]](**fields)
