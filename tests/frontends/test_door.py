"""`from_model`, and parameters by name."""

from __future__ import annotations

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import tangents
from tangents import frontends
from tangents.frontends.parameters import ParameterNames, chosen


def test_a_plain_function_passes_through():
    f = lambda params, x: x @ params
    assert tangents.from_model(f) == (f, None)
    assert frontends.as_apply_fn(f) is f


def test_what_is_no_model_is_named():
    with pytest.raises(TypeError, match=r"from_model: int is not a model.*keras, tensorflow"):
        tangents.from_model(3)


def test_nothing_is_imported():
    code = (
        "import sys, tangents, tangents.experimental; tangents.from_model(len); "
        "tangents.frontends.as_jax({'a': 1.0}); "
        "assert not {'tensorflow', 'keras', 'torch', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_make_a_tree_and_take_it_apart():
    names = ParameterNames(["a/w", "a/b", "c"], [(2,), (), (3,)])
    values = [np.ones(2), np.float32(1), np.ones(3)]
    tree = names.tree(values)
    assert tree == {"a": {"w": values[0], "b": values[1]}, "c": values[2]}
    flat = dict(zip(names.paths, values, strict=True))
    for params in (tree, flat, values, tuple(values)):
        found = names.values(params, caller="f")
        assert all(x is y for x, y in zip(found, values, strict=True))


def test_equal_names_are_told_apart():
    names = ParameterNames(["w", "w", "w/b", "a/b", "a"], [()] * 5)
    assert len(set(names.paths)) == 5
    values = [np.float32(i) for i in range(5)]
    assert names.values(names.tree(values), caller="f") == values


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": {"w": np.ones(2)}}, r"f: params has no 'b'; it has \['a/w'\]"),
        ([np.ones(2)], r"f: params is a list of length 1; it must be .* \['a/w', 'b'\]"),
        (np.ones(2), r"f: params is of type ndarray"),
        ([np.ones(3), np.ones(())], r"f: params\['a/w'\] has shape \(3,\); .* shape \(2,\)"),
    ],
)
def test_parameters_that_do_not_fit_are_named(params, message):
    names = ParameterNames(["a/w", "b"], [(2,), ()])
    with pytest.raises(ValueError, match=message):
        names.values(params, caller="f")


def test_trainable_chooses():
    assert chosen("a/w", True, None) and not chosen("a/w", False, None)
    assert chosen("a/w", False, ["a"]) and not chosen("ab/w", False, ["a"])
    assert chosen("a/w", False, lambda path: path.endswith("w"))


def test_arrays_are_left_alone():
    tree = {"a": jnp.ones(3), "b": np.ones(3), "c": 1.0, "d": None, "e": "text"}
    assert frontends.as_jax(tree) is tree or frontends.as_jax(tree) == tree
