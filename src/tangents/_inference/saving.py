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
    "predictor": name, "arguments": [[name, node], ...], "missing": [names], "computed": node
                                       what the public function of that name makes; arguments that
                                       are not data are missing, and are passed to `load`

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
from tangents._inference.ensemble import gradient_descent_mse_ensemble
from tangents._inference.function_space import ODEState, gradient_descent
from tangents._inference.gaussian_process import Gaussian, gp_inference
from tangents._inference.gradient_flow import gradient_descent_mse
from tangents._inference.network_posterior import NetworkPosterior, network_posterior
from tangents._inference.predictor import Predictor
from tangents._inference.regression import KernelRegression
from tangents._inference.solution import Solution
from tangents._inference.spectrum import Spectrum
from tangents._infinite.kernel import Kernel
from tangents._version import __version__

Read = Callable[[str], np.ndarray]
FORMAT = 1
TYPES: dict[str, type] = {
    cls.__name__: cls for cls in (Kernel, KernelRegression, ODEState, Solution, Spectrum)
}
NAMED: dict[str, Any] = {"Gaussian": Gaussian}
MAKERS: dict[str, Callable[..., Any]] = {
    maker.__name__: maker
    for maker in (
        gradient_descent,
        gradient_descent_mse,
        gradient_descent_mse_ensemble,
        gp_inference,
        network_posterior,
    )
}


def save(path: str | os.PathLike[str], result: Any) -> None:
    """Save a result: arrays, `Kernel`, fitted regressions, spectra, solutions, and trees of them.

    It is written beside `path` and moved into place when complete; whatever interrupts it, nothing
    half-written bears the name or stays behind.

    Args:
        path: of the file; `.npz` is customary and not added. One that ends in `.zarr` becomes a
            directory in Zarr 3, of chunks that other programs can read one at a time.
        result: arrays (such as a dense kernel, `operator.materialise()`), numbers, strings, None,
            `Kernel`, `KernelRegression`, `Spectrum`, `Solution`, `ODEState`, what the functions
            of `predict` and `network_posterior` return, and named tuples, tuples, lists and
            dictionaries of these. Of a predictor the arguments it was made from are saved, and
            the factors and kernels it has computed; a function among them (`kernel_fn`, `loss`,
            `f`) is left out and must be passed to `load`.

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


def load(path: str | os.PathLike[str], **functions: Any) -> Any:
    """Load what `save` saved, arrays as JAX arrays.

    Args:
        path: of the file.
        **functions: of the predictors in it, what is not data, by the name of the argument:
            `load(path, kernel_fn=kernel_fn)`. They must be what the predictor was made with:
            what it has computed is taken over.

    Raises:
        ValueError: if the file is not of this format, or of a newer version of it; if a predictor
            in it needs a function that is not passed, or one is passed that none needs. In float32
            mode float64 arrays are rounded, as everywhere in JAX.
        ImportError: for a Zarr directory without zarr: `tangents[zarr]`.

    Examples:
        >>> import tempfile, os, jax.numpy as jnp, tangents
        >>> path = os.path.join(tempfile.mkdtemp(), "posterior.npz")
        >>> f = lambda w, x: jnp.tanh(x @ w)
        >>> x = jnp.linspace(-1, 1, 6)[:, None]
        >>> tangents.save(path, tangents.network_posterior(f, jnp.ones((1, 1)), x, noise=0.1))
        >>> tangents.load(path, f=f).predict(jnp.zeros((2, 1))).covariance.shape
        (2, 1)
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
        return _loaded(path, header, read, functions)
    with np.load(path, allow_pickle=False) as archive:
        if "header" not in archive:
            raise ValueError(foreign)
        header = json.loads(archive["header"].tobytes().decode())
        return _loaded(path, header, archive.__getitem__, functions)


def _loaded(path: str, header: Any, read: Read, functions: dict[str, Any]) -> Any:
    asked: set[str] = set()
    result = _decode(_content(path, header), read, functions, asked)
    if unknown := sorted(functions.keys() - asked):
        raise ValueError(
            f"load: {path} needs no {', '.join(unknown)}"
            + (f", but {', '.join(sorted(asked))}." if asked else ": it holds all of its data.")
        )
    return result


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
    if isinstance(value, Predictor | NetworkPosterior):
        return _encode_predictor(value, arrays, where)
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


def _encode_predictor(
    value: Predictor | NetworkPosterior, arrays: dict[str, np.ndarray], where: str
) -> Any:
    maker, arguments, computed = value.recipe()
    known, missing = [], []
    for name, argument in arguments.items():
        before = len(arrays)
        try:
            known.append([name, _encode(argument, arrays, f"{where}.{name}")])
        except TypeError:
            missing.append(name)
            for extra in list(arrays)[before:]:
                del arrays[extra]
    node = {"predictor": maker, "arguments": known, "missing": missing}
    return node | {"computed": _encode(computed, arrays, f"{where}.computed")}


def _decode_predictor(
    node: dict[str, Any], read: Read, functions: dict[str, Any], asked: set[str]
) -> Any:
    name, missing = node["predictor"], node["missing"]
    if name not in MAKERS:
        raise ValueError(f"load: the file holds a predictor of {name!r}, unknown to this version.")
    asked.update(missing)
    if absent := [argument for argument in missing if argument not in functions]:
        wanted = ", ".join(f"{argument}=..." for argument in absent)
        raise ValueError(
            f"load: the predictor of {name} was saved without {', '.join(absent)}, which is not "
            f"data: pass load(path, {wanted})."
        )
    arguments = {k: _decode(v, read, functions, asked) for k, v in node["arguments"]}
    made = MAKERS[name](**arguments, **{argument: functions[argument] for argument in missing})
    return made.resumed(_decode(node["computed"], read, functions, asked))


def _decode(node: Any, read: Read, functions: dict[str, Any], asked: set[str]) -> Any:
    if not isinstance(node, dict):
        return node
    again = lambda child: _decode(child, read, functions, asked)
    if "array" in node:
        host = read(node["array"])
        dtype = jnp.dtype(node["dtype"])
        return jnp.asarray(host if host.dtype == dtype else host.view(dtype))
    if "float" in node:
        return float(node["float"])
    if "list" in node:
        return [again(v) for v in node["list"]]
    if "tuple" in node:
        return tuple(again(v) for v in node["tuple"])
    if "dict" in node:
        return {k: again(v) for k, v in node["dict"]}
    if "predictor" in node:
        return _decode_predictor(node, read, functions, asked)
    fields = {k: again(v) for k, v in node["fields"]}
    if "namedtuple" in node:
        name = node["namedtuple"]
        cls = NAMED[name] if name in NAMED else named_tuple(name, tuple(fields))
        return cls(**fields)
    if node["type"] not in TYPES:
        raise ValueError(f"load: the file holds a {node['type']!r}, which this version has not.")
    return TYPES[node["type"]](**fields)
