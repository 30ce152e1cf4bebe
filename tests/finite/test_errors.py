"""Bad input: the text of each error has the argument, the shape it had and the one it needed."""

import jax.numpy as jnp
import numpy as np
import pytest

import tangents as nt
from finite.table import normal

F = lambda p, x: x @ p
P, X1, X2 = normal(0, 3, 10), normal(1, 8, 3), normal(2, 5, 3)

CASES = [
    (
        {"trace_axes": (2,)},
        r"empirical_ntk_fn: trace_axes=\(2,\) is out of range: f\(params, x1\) has shape "
        r"\(8, 10\), so its axes are 0 and 1 \(or -2, -1\)\.",
    ),
    (
        {"trace_axes": (-1,), "diagonal_axes": (1,)},
        r"axis 1 is in both trace_axes=\(1,\) and diagonal_axes=\(1,\)",
    ),
    (
        {"diagonal_axes": (0,)},
        r"diagonal_axes contains axis 0, along which f\(params, x1\) has size 8 and "
        r"f\(params, x2\) has size 5",
    ),
    (
        {"vmap_axes": 1},
        r"vmap_axes=1: x1 has 3 examples along axis 1 of x1 \(8, 3\), but f\(params, x1\) has "
        r"shape \(8, 10\), which is 10 along its axis 1",
    ),
    ({"vmap_axes": 2}, r"axis 2 is out of range: x1 has shape \(8, 3\)"),
    ({"vmap_axes": (0, 0, {"mask": 0})}, r"maps the keyword argument 'mask', which the call does"),
    ({"vmap_axes": (None, 0, {})}, "maps no axis of x1"),
    ({"vmap_axes": ({"a": 0}, 0, {})}, "do not match the structure of x1"),
    ({"vmap_axes": (0, None, {})}, "every output needs a batch axis"),
    (
        {"implementation": 7},
        r"implementation=7 is not an NtkImplementation: pass one of AUTO \(0\)",
    ),
    ({"implementation": "FAST"}, "implementation='FAST' is not an NtkImplementation"),
    ({"implementation": True}, "implementation=True is not an NtkImplementation"),
    ({"precision": "exact"}, "precision='exact' is not known: pass None"),
]


@pytest.mark.parametrize(("arguments", "text"), CASES, ids=[str(c[0]) for c in CASES])
def test_text_of_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        nt.empirical_ntk_fn(F, **arguments)(X1, X2, P)


def test_types_of_axes_and_get():
    for axes in (None, (1.0,), "a"):
        with pytest.raises(TypeError, match=r"trace_axes=.* must be an integer or a sequence"):
            nt.empirical_ntk_fn(F, trace_axes=axes)(X1, X2, P)
    assert nt.empirical_ntk_fn(F, np.int64(-1), vmap_axes=np.int64(0))(X1, X2, P).shape == (8, 5)
    with pytest.raises(TypeError, match="get=3 must be a name"):
        nt.empirical_kernel_fn(F)(X1, X2, 3, P)


def test_types_of_vmap_axes():
    with pytest.raises(TypeError, match="must be integers or None, not 'batch'"):
        nt.empirical_ntk_fn(F, vmap_axes="batch")(X1, X2, P)


def test_broken_promise_seen_in_shapes():
    """A batch that is summed over: one example at a time has another shape."""
    f = lambda p, x: jnp.broadcast_to(x @ p, (8, 10)) if x.shape[0] == 1 else x @ p
    with pytest.raises(ValueError, match=r"\(8, 10\) on one, where \(1, 10\) was needed"):
        nt.empirical_ntk_fn(f, vmap_axes=0)(X1, None, P)


def test_outputs_without_axes_need_empty_trace_axes():
    text = r"trace_axes=\(-1,\) is out of range: f\(params, x1\) has shape \(\), so it has no axes"
    with pytest.raises(ValueError, match=text):
        nt.empirical_ntk_fn(lambda p, x: jnp.sum(x @ p))(X1, X2, P)


def test_mismatched_outputs():
    f = lambda p, x: x @ p if x.shape[0] == 8 else (x @ p, x @ p)
    with pytest.raises(ValueError, match="have different structures"):
        nt.empirical_ntk_fn(f)(X1, X2, P)
    g = lambda p, x: x @ p if x.shape[0] == 8 else (x @ p)[0]
    with pytest.raises(ValueError, match="they need the same number of axes"):
        nt.empirical_ntk_fn(g, ())(X1, X2, P)


def test_implementations_are_found_by_number_and_name():
    for value in (1, "jacobian_contraction", nt.NtkImplementation.JACOBIAN_CONTRACTION):
        assert nt.empirical_ntk_fn(F, implementation=value)(X1, X2, P).shape == (8, 5)
    assert [int(m) for m in nt.NtkImplementation] == [0, 1, 2, 3]
