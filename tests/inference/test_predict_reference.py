"""`predict` against results of neural-tangents in float64 (see tests/data/predict/ORIGIN.md)."""

import collections
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents import predict

DATA = pathlib.Path(__file__).parents[1] / "data" / "predict"
CASES = json.loads((DATA / "predict.json").read_text())["cases"]
ARRAYS = dict(np.load(DATA / "predict.npz"))
INPUTS = {name[3:]: value for name, value in ARRAYS.items() if name.startswith("in/")}
Pair = collections.namedtuple("Pair", "nngp ntk")

LOSSES = {
    "mse": lambda fx, y: 0.5 * jnp.mean((fx - y) ** 2),
    "sse": lambda fx, y: 0.5 * jnp.sum((fx - y) ** 2) / y.shape[0],
    "xent": lambda fx, y: -jnp.mean(jnp.sum(jax.nn.log_softmax(fx) * y, -1)),
    "huber": lambda fx, y: jnp.mean(jnp.sqrt(1 + (fx - y) ** 2) - 1),
}


def argument(name, value):
    if name == "get":
        return tuple(value) if isinstance(value, list) else value
    if name == "t" and isinstance(value, list):
        return np.asarray(value)
    if value == "inf":
        return jnp.inf
    if isinstance(value, str):
        return jnp.asarray(INPUTS[value])
    if isinstance(value, list) and value and isinstance(value[0], str):
        arrays = [jnp.asarray(INPUTS[v]) for v in value]
        return predict.ODEState(*arrays) if name == "state" else Pair(*arrays)
    return tuple(value) if isinstance(value, list) else value


def arguments(given):
    names = {"state": "fx_train_or_state_0"}
    return {names.get(name, name): argument(name, value) for name, value in given.items()}


def network(spec):
    from tangents import stax

    name, rest = spec[0], spec[1:]
    if name == "serial":
        return stax.serial(*(network(s) for s in rest))
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in rest[0].items()}
    return getattr(stax, name)(**kwargs)


def flatten(value, prefix, out):
    if isinstance(value, predict.ODEState):
        for name in ("fx_train", "fx_test", "qx_train", "qx_test"):
            flatten(getattr(value, name), f"{prefix}.{name}", out)
    elif isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        for name, part in zip(names, value, strict=True):
            flatten(part, f"{prefix}.{name}", out)
    elif value is not None:
        out[prefix] = value


def predictor(case):
    kwargs = arguments(case["kw"])
    if case["kind"] == "mse":
        return predict.gradient_descent_mse(**kwargs)
    if case["kind"] == "gd":
        return predict.gradient_descent(LOSSES[case["loss"]], **kwargs)
    if case["kind"] == "gp":
        return predict.gp_inference(**kwargs)
    return predict.gradient_descent_mse_ensemble(network(case["net"])[2], **kwargs)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_reference(case, x64):
    if not x64:
        pytest.skip("the reference is float64")
    results = {}
    if case["kind"] == "maxlr":
        results["lr"] = predict.max_learning_rate(**arguments(case["kw"]))
    else:
        if case["kind"] == "ensemble":
            pytest.importorskip("tangents.stax")
        predict_fn = predictor(case)
        for i, call in enumerate(case["calls"]):
            flatten(predict_fn(**arguments(call)), f"call{i}", results)
    expected = {
        k.split("/", 1)[1]: v for k, v in ARRAYS.items() if k.startswith(case["name"] + "/")
    }
    assert set(expected) <= set(results)
    for name, value in expected.items():
        assert results[name].shape == value.shape, name
        finite = np.isfinite(value)
        np.testing.assert_allclose(
            np.asarray(results[name])[finite],
            value[finite],
            rtol=max(1e-10, case.get("rtol") or 0),
            atol=1e-12 * max(np.abs(value[finite]).max(initial=0), 1e-300),
            err_msg=name,
        )
