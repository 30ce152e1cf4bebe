"""Finite networks against results of neural-tangents (tests/data/neural_tangents/ORIGIN.md)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree_util

import tangents as nt
from finite.table import METHODS
from infinite import reference_cases as ref

QUICK = {"ntk_full_fcn_2", "ntk_trace_fcn", "ntk_diagneg_vmap_1", "ntk_full_two_out_1", "vp_cnn"}
"""Kernels that run by default; the rest are the same axes on other layers."""


@functools.cache
def _cases():
    listed = json.loads((ref.FOLDER / "empirical.json").read_text())["cases"]
    return {c["name"]: c for c in listed if not c.get("suspect") and _stands(c)}


def _stands(case):
    return "impl" not in case or case["impl"] in [int(m) for m in METHODS]


@functools.cache
def _arrays():
    with np.load(ref.FOLDER / "empirical.npz") as stored:
        return {name: stored[name] for name in stored}


def _input(name):
    return None if name is None else jnp.asarray(_arrays()[f"in/{name}"])


def _network(case):
    """apply_fn, parameters with the stored values, and both inputs."""
    init_fn, apply_fn, _ = ref.network(case["net"])
    x1, x2 = _input(case["x1"]), _input(case["x2"])
    shape, params = init_fn(jax.random.key(0), x1.shape)
    leaves, tree = tree_util.tree_flatten(params)
    stored = [_input(f"{case['pkey']}/p{i}") for i in range(len(leaves))]
    assert f"in/{case['pkey']}/p{len(leaves)}" not in _arrays()
    assert [leaf.shape for leaf in leaves] == [value.shape for value in stored]
    return apply_fn, tree_util.tree_unflatten(tree, stored), x1, x2, shape


def _check(name, results, x64):
    case = _cases()[name]
    rtol = max(1e-10, case.get("rtol", 0)) if x64 else 2e-3
    stored = {k.split("/", 1)[1]: v for k, v in _arrays().items() if k.startswith(name + "/")}
    assert set(stored) <= set(results) and stored
    for key, expected in stored.items():
        got = np.asarray(results[key])
        assert got.shape == expected.shape, key
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * scale, err_msg=key)


def _marked(kinds):
    names = [n for n, c in _cases().items() if c["kind"] in kinds]
    quick = lambda n: _cases()[n]["kind"] == "apply" or n in QUICK
    return [n if quick(n) else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.filterwarnings("ignore")  # which layers warn is tested elsewhere
@pytest.mark.parametrize("name", _marked(["apply"]))
def test_init_and_apply(name, x64):
    case = _cases()[name]
    apply_fn, params, x1, _, shape = _network(case)
    kwargs = {
        k: ref.argument(v) if "$arr" not in v else _input(v["$arr"])
        for k, v in case.get("apply_kw", {}).items()
    }
    outputs = tree_util.tree_leaves(jax.jit(lambda p, x: apply_fn(p, x, **kwargs))(params, x1))
    if case.get("neg"):
        shape = ref.network(case["net"])[0](jax.random.key(0), (-1, *x1.shape[1:]))[0]
    results = {f"y{i}": y for i, y in enumerate(outputs)}
    _check(name, {**results, "shape": np.asarray(shape)}, x64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _marked(["ntk"]))
def test_kernels(name, x64):
    case = _cases()[name]
    apply_fn, params, x1, x2, _ = _network(case)
    axes = {k: tuple(v) if isinstance(v, list) else v for k, v in case["kw"].items()}
    output_axes = {k: v for k, v in axes.items() if k != "vmap_axes"}
    ntk_fn = nt.empirical_ntk_fn(apply_fn, implementation=case["impl"], **axes)
    nngp_fn = nt.empirical_nngp_fn(apply_fn, **output_axes)
    both = lambda a, b, p: {"ntk": ntk_fn(a, b, p), "nngp": nngp_fn(a, b, p)}
    results = {}
    for mode, second in (("12", x2), ("11", None)):
        for kind, kernels in jax.jit(both)(x1, second, params).items():
            for i, kernel in enumerate(tree_util.tree_leaves(kernels)):
                results[f"{mode}.{kind}{i}"] = kernel
    _check(name, results, x64)


@pytest.mark.parametrize("name", _marked(["lin"]))
def test_taylor_expansions(name, x64):
    case = _cases()[name]
    apply_fn, params, x1, _, _ = _network(case)
    moved = tree_util.tree_map(
        lambda a: a + 0.05 * jnp.sin(jnp.arange(a.size, dtype=a.dtype).reshape(a.shape)), params
    )
    results = {"lin": nt.linearize(apply_fn, params)(moved, x1)}
    for degree in range(4):
        expansion = nt.taylor_expand(apply_fn, params, degree)
        results[f"taylor{degree}"] = jax.jit(expansion)(moved, x1)
    _check(name, results, x64)


@pytest.mark.parametrize("name", _marked(["vp"]))
def test_vector_products(name, x64):
    case = _cases()[name]
    apply_fn, params, x1, x2, _ = _network(case)
    product = lambda x, v: nt.empirical_ntk_vp_fn(apply_fn, x1, x, params)(v)
    results = {
        "vp": jax.jit(product)(x2, _input(case["v"])),
        "vp_none": jax.jit(lambda v: product(None, v))(_input(case["v1"])),
    }
    _check(name, results, x64)
