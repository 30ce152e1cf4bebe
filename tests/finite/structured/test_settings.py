"""The settings of structured derivatives: every one takes another route to the same numbers."""

import functools

import jax
import numpy as np
import pytest

import tangents as nt
from finite.structured.networks import NETWORKS
from reference import finite as reference
from tangents._finite.problem import make_problem
from tangents._finite.structure.passes import Traced


@pytest.mark.parametrize("forward", [None, False, True])
@pytest.mark.parametrize("s_rules", [True, False])
@pytest.mark.parametrize("j_rules", [True, False])
@pytest.mark.parametrize("name", ["views"])
def test_rule_settings(name, j_rules, s_rules, forward, rtol):
    network = next(n for n in NETWORKS if n.name == name)
    fn = nt.empirical_ntk_fn(
        network.f, (-1,), (), 0, 3, _j_rules=j_rules, _s_rules=s_rules, _fwd=forward
    )
    expected = _traced_reference(name)
    got = jax.jit(fn)(network.x1, network.x2, network.params)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * scale)
    problem = make_problem(
        network.f, network.x1, None, network.params, {}, vmap_axes=0, caller="test"
    )
    analysis = Traced(problem, problem.side1, factor=j_rules, follow=s_rules).analysis
    assert all(use.reason for use in analysis.uses) == (not j_rules)
    assert name != "views" or (len(analysis.roots) == len(problem.leaves)) == s_rules


@functools.cache
def _traced_reference(name):
    network = next(n for n in NETWORKS if n.name == name)
    return reference.ntk(network.f, network.params, network.x1, network.x2)
