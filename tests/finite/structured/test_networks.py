"""Structured derivatives of whole networks, by every plan, against full Jacobians."""

import functools

import jax
import numpy as np
import pytest

from finite.structured.networks import NETWORKS
from reference import finite as reference
from tangents._finite.functions import compute
from tangents._finite.methods import structured_derivatives
from tangents._finite.problem import make_problem

CHUNKED = structured_derivatives.Options(
    chunks=lambda extent: type(extent)(*(max(1, size // 2) for size in vars(extent).values()))
)
OPTIONS = {
    "chosen": structured_derivatives.Options(),
    "outer": structured_derivatives.Options(form="outer"),
    "pairs": structured_derivatives.Options(form="pairs"),
    "chunked": CHUNKED,
}


@functools.cache
def _full_reference(name, symmetric):
    network = next(n for n in NETWORKS if n.name == name)
    j1 = reference.jacobian(network.f, network.params, network.x1)
    j2 = j1 if symmetric else reference.jacobian(network.f, network.params, network.x2)
    return np.tensordot(j1, j2, (-1, -1))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def test_network(network, options, rtol):
    method = functools.partial(structured_derivatives.kernels, options=options)

    for symmetric, axes in ((False, ()), (True, (-1,))):

        def kernel(params, x1, x2, axes=axes):
            problem = make_problem(
                network.f, x1, x2, params, {}, vmap_axes=network.vmap, caller="test"
            )
            return compute(problem, method, problem.pair_axes(axes, ()))[0]

        x2 = None if symmetric else network.x2
        got = jax.jit(kernel)(network.params, network.x1, x2)
        full = _full_reference(network.name, symmetric)
        expected = reference.reduce_pairs(full, axes, ())
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * scale)
