"""Spectra, alignments, pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tangents

N = 40  # rows of the fixture `kernel`


class Operator:
    def __init__(self, k):
        self.k, self.shape, self.dtype = k, k.shape, k.dtype

    def __matmul__(self, v):
        return self.k @ v

    def trace(self):
        return jnp.trace(self.k)


@pytest.mark.parametrize("wrap", [lambda k: k, Operator], ids=["matrix", "operator"])
def test_leading_eigenvalues_within_their_bounds(wrap, kernel, x64):
    k, values, _ = kernel
    found = tangents.spectrum(wrap(k), 5)
    rounding = 1e-13 if x64 else 1e-6
    assert (np.abs(found.eigenvalues - values[:5]) <= found.error_bounds + rounding).all()
    assert (found.error_bounds < (1e-10 if x64 else 1e-4)).all()
    loose = tangents.spectrum(wrap(k), 5, tol=1e-2)
    assert (np.abs(loose.eigenvalues - values[:5]) <= loose.error_bounds + rounding).all()
    assert not found.complete


def test_full_spectrum_and_what_follows(kernel, rtol):
    k, values, y = kernel
    s = jax.jit(tangents.spectrum)(k)
    assert s.complete
    np.testing.assert_allclose(s.eigenvalues, values, rtol=100 * rtol)
    ridges = jnp.array([0.01, 0.1])
    exact = [np.trace(k @ np.linalg.inv(k + r * np.eye(N))) for r in ridges]
    np.testing.assert_allclose(tangents.effective_dimension(k, ridges), exact, rtol=100 * rtol)
    partial = tangents.spectrum(k, 10)
    below = tangents.effective_dimension(partial, ridges)
    assert (below <= jnp.asarray(exact)).all() and (below > 0.5 * jnp.asarray(exact)).all()
    np.testing.assert_allclose(
        tangents.condition_number(k, 0.1), (1 + 0.1) / (values[-1] + 0.1), rtol=100 * rtol
    )
    assert tangents.condition_number(k - jnp.eye(N)) == jnp.inf
    curve = tangents.task_model_alignment(k, y)
    assert (jnp.diff(curve) >= 0).all()
    np.testing.assert_allclose(curve[-1], 1, rtol=100 * rtol)
    # The leading eigenvector itself is held by the first mode alone.
    np.testing.assert_allclose(
        tangents.task_model_alignment(partial, s.eigenvectors[:, 0]), 1, rtol=100 * rtol
    )


def test_operator_of_a_network_agrees_with_its_matrix(x64):
    f = lambda w, x: jnp.tanh(x @ w[0]) @ w[1]
    keys = jax.random.split(jax.random.key(0), 3)
    w = (jax.random.normal(keys[0], (3, 5)), jax.random.normal(keys[1], (5, 2)))
    x = jax.random.normal(keys[2], (4, 3))
    op = tangents.ntk_operator(f, w, x)
    lead, full = tangents.spectrum(op, 2), tangents.spectrum(op.materialise())
    tol = 1e-9 if x64 else 1e-3
    np.testing.assert_allclose(lead.eigenvalues, full.eigenvalues[:2], rtol=tol)
    np.testing.assert_allclose(lead.trace, full.trace, rtol=tol)


def test_alignments(kernel, rtol):
    k, _, y = kernel
    centre = jnp.eye(N) - 1 / N
    a, b = centre @ k @ centre, centre @ (y @ y.T) @ centre
    exact = jnp.sum(a * b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)
    np.testing.assert_allclose(tangents.target_alignment(k, y), exact, rtol=100 * rtol)
    np.testing.assert_allclose(tangents.kernel_alignment(k, y @ y.T), exact, rtol=100 * rtol)
    plain = jnp.sum(k * (y @ y.T)) / jnp.linalg.norm(k) / jnp.linalg.norm(y @ y.T)
    np.testing.assert_allclose(
        tangents.target_alignment(k, y, centred=False), plain, rtol=100 * rtol
    )
    np.testing.assert_allclose(tangents.kernel_distance(k, 3 * k), 0, atol=rtol)
    # What centring removes does not count.
    shifted = k + 5.0
    np.testing.assert_allclose(tangents.kernel_alignment(k, shifted), 1, rtol=100 * rtol)
    assert tangents.kernel_distance(k, shifted) > 0.1
    speed = tangents.kernel_velocity([k, shifted, shifted], [0.0, 2.0, 3.0])
    np.testing.assert_allclose(speed[0], tangents.kernel_distance(k, shifted) / 2, rtol=100 * rtol)
    np.testing.assert_allclose(speed[1], 0, atol=rtol)


def test_errors(kernel):
    k, _, y = kernel
    with pytest.raises(ValueError, match=r"pass k < 40, or kernel.materialise\(\)"):
        tangents.spectrum(Operator(k))
    with pytest.raises(ValueError, match="k=41 is out of range"):
        tangents.spectrum(k, 41)
    with pytest.raises(ValueError, match="the smallest is needed"):
        tangents.condition_number(tangents.spectrum(k, 3))
    with pytest.raises(ValueError, match="must be square"):
        tangents.kernel_alignment(k[:3], k)
    with pytest.raises(ValueError, match=r"pass y \(n, c\)"):
        tangents.target_alignment(k, y[:3])


def test_plots_take_and_return_axes(kernel):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from tangents import plot

    k, values, _ = kernel
    x = jnp.linspace(-1, 1, N)[::-1]
    t = jnp.arange(3.0)
    curves = jnp.stack([t, 2 * t], axis=1)
    calls = [
        lambda ax: plot.kernel_matrix(k, np.arange(N) % 3, ax=ax),
        lambda ax: plot.spectrum(tangents.spectrum(k, 5), ridge=0.1, ax=ax),
        lambda ax: plot.learning_curves([1, 2], {"a": [[1, 2], [0.5, 0.6]]}, ax=ax),
        lambda ax: plot.predictive_bands(x, x, jnp.ones((N, N)), train=(x, x), ax=ax),
        lambda ax: plot.training_dynamics(t, curves, curves, ax=ax),
    ]
    for call in calls:
        figure = Figure()
        ax = figure.add_subplot()
        assert call(ax) is ax
        assert call(None).figure is not figure
    ax = plot.spectrum(tangents.spectrum(k))
    assert ax.get_yscale() == "log"
    np.testing.assert_allclose(ax.lines[0].get_ydata(), values, rtol=1e-3)
    ordered = plot.kernel_matrix(k, np.arange(N)[::-1]).images[0].get_array()
    np.testing.assert_allclose(ordered, k[::-1, ::-1])
    band = plot.predictive_bands(x, x, jnp.ones(N)).lines[0]
    assert (np.diff(band.get_xdata()) > 0).all()
    with pytest.raises(ValueError, match="40 inputs, 3 means"):
        plot.predictive_bands(x, t, jnp.ones(N))
    with pytest.raises(ValueError, match="labels"):
        plot.kernel_matrix(k, [0, 1])
