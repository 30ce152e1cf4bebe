"""Reads the networks of `tests/data/neural_tangents/stax.json` (see ORIGIN.md there)."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from tangents import stax

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "neural_tangents"


@functools.cache
def cases():
    """All cases that can be compared, by name."""
    listed = json.loads((FOLDER / "stax.json").read_text())["cases"]
    return {c["name"]: c for c in listed if not c.get("suspect")}


@functools.cache
def arrays():
    with np.load(FOLDER / "stax.npz") as stored:
        return {name: stored[name] for name in stored}


def _root(v1, v2):
    return (1 + 2 * v1) * (1 + 2 * v2)


FUNCTIONS = {
    "erf": jax.scipy.special.erf,
    "erf_nngp": lambda c, v1, v2: 2 / np.pi * jnp.arcsin(2 * c / jnp.sqrt(_root(v1, v2))),
    "erf_dnngp": lambda c, v1, v2: 4 / np.pi / jnp.sqrt(_root(v1, v2) - 4 * c**2),
    "tanh": jnp.tanh,
    "dtanh": lambda x: 1 - jnp.tanh(x) ** 2,
    "swish": jax.nn.silu,
    "exp_decay": lambda d: jnp.exp(-0.7 * d),
    "swap": lambda p: jnp.swapaxes(p, -1, -2),
}


def argument(value):
    """A keyword argument of a layer from its description."""
    if isinstance(value, list):
        return tuple(argument(v) for v in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "$fn":
        return FUNCTIONS[content]
    if kind == "$arr":
        return jnp.asarray(arrays()[f"in/{content}"])
    assert kind == "$slice"
    items = [... if i == "..." else slice(*i) if isinstance(i, list) else i for i in content]
    return stax.Slice[tuple(items)]


def network(description):
    """The layer a description stands for."""
    name, *rest = description
    if name in ("serial", "parallel"):
        return getattr(stax, name)(*map(network, rest))
    if name == "repeat":
        return stax.repeat(network(rest[0]), rest[1])
    return getattr(stax, name)(**{k: argument(v) for k, v in rest[0].items()})


def inputs(names):
    """The inputs of a case: None, an array, or a list of arrays."""
    if names is None:
        return None
    if isinstance(names, list):
        return [inputs(n) for n in names]
    return jnp.asarray(arrays()[f"in/{names}"])


def results(name, mode, output):
    """Reference results of one output: `{field: array}`."""
    prefix = f"{name}/{mode}/{output}/"
    return {k.removeprefix(prefix): v for k, v in arrays().items() if k.startswith(prefix)}
