"""Trace and diagonal axes: layout arithmetic against NumPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import finite as reference
from tangents._core.axes import PairAxes


@st.composite
def _cases(draw):
    shape = draw(st.lists(st.integers(1, 3), min_size=0, max_size=3))
    kinds = [draw(st.sampled_from(["pair", "trace", "diagonal"])) for _ in shape]
    pick = lambda kind: tuple(i for i, k in enumerate(kinds) if k == kind)
    return tuple(shape), pick("trace"), pick("diagonal")


@given(_cases(), st.integers(0, 99))
def test_reduction_and_shape(case, seed):
    shape, trace, diagonal = case
    axes = PairAxes.of(shape, shape, trace, diagonal, caller="test")
    full = np.random.default_rng(seed).normal(size=shape + shape).astype(np.float32)
    got = np.asarray(axes.reduce_full(full))
    assert got.shape == axes.kernel_shape(shape, shape)
    np.testing.assert_allclose(
        got, reference.reduce_pairs(full, trace, diagonal), rtol=1e-5, atol=1e-6
    )


@given(_cases(), st.integers(0, 99))
def test_symmetrise_copies_one_triangle(case, seed):
    shape, trace, diagonal = case
    axes = PairAxes.of(shape, shape, trace, diagonal, caller="test")
    kernel = np.random.default_rng(seed).normal(size=axes.kernel_shape(shape, shape))
    kernel = kernel.astype(np.float32)
    got = np.asarray(axes.symmetrise(kernel))
    np.testing.assert_array_equal(got, np.asarray(axes.symmetrise(got)))
    swap = []
    for axis in range(len(shape)):
        if axis in axes.pairs:
            swap += [len(swap) + 1, len(swap)]
        elif axis in diagonal:
            swap.append(len(swap))
    np.testing.assert_array_equal(got, got.transpose(swap))
    assert np.isin(got, kernel).all()


def test_different_sizes():
    axes = PairAxes.of((4, 2), (3, 2), (-1,), (), caller="test")
    assert axes.kernel_shape((4, 2), (3, 2)) == (4, 3)
    with pytest.raises(ValueError, match=r"size 4 .* size 3"):
        PairAxes.of((4, 2), (3, 2), (), (0,), caller="test")


def test_an_axis_named_twice_counts_once():
    twice = PairAxes.of((2, 3), (2, 3), (0, -2, 0), (1, -1), caller="test")
    assert twice == PairAxes.of((2, 3), (2, 3), (0,), (1,), caller="test")
