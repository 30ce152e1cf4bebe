"""gp_inference and the ensemble: means, covariances, limits."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents import predict

Pair = collections.namedtuple("Pair", "nngp ntk")
X = np.random.default_rng(1).normal(size=(9, 4))
TRAIN, TEST = X[:6], X[6:]


def nngp(a, b):
    """One ReLU layer: the arc-cosine kernel of order one, straight from its formula."""
    norms = jnp.outer(jnp.linalg.norm(a, axis=1), jnp.linalg.norm(b, axis=1))
    cosine = jnp.clip(a @ b.T / norms, -1, 1)
    angle = jnp.arccos(cosine)
    return norms * (jnp.sin(angle) + (jnp.pi - angle) * cosine) / (2 * jnp.pi)


def kernel_fn(x1, x2, get, scale=None):
    x2 = x1 if x2 is None else x2
    s1, s2 = (1.0, 1.0) if scale is None else scale
    one = nngp(x1, x2) * s1 * s2
    kernels = {"nngp": one, "ntk": one + jnp.exp(x1 @ x2.T / 8) * s1 * s2}
    return kernels[get] if isinstance(get, str) else Pair(*(kernels[g] for g in ("nngp", "ntk")))


@pytest.fixture
def data():
    dtype = jnp.result_type(float)
    y = jnp.asarray(np.random.default_rng(2).normal(size=(6, 2)), dtype)
    return jnp.asarray(TRAIN, dtype), jnp.asarray(TEST, dtype), y


@pytest.fixture
def close(x64):
    def check(a, b, factor=1.0):
        tol = (1e-8 if x64 else 1e-3) * factor
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)

    return check


def kernels(x, x2=None):
    return kernel_fn(x, x2, ("nngp", "ntk"))


def test_noiseless_posterior_at_training_points(data, close):
    x, _, y = data
    k = kernels(x)
    for kind in ("nngp", "ntk", "ntkgp"):
        mean, cov = predict.gp_inference(k, y)(kind, k, k)
        close(mean, y, 10)
        close(cov, jnp.zeros_like(cov), 10)


def test_posterior_covariance_is_semidefinite(data, x64):
    x, xt, y = data
    posterior = predict.gp_inference(kernels(x), y, diag_reg=1e-2)
    for kind in ("nngp", "ntk", "ntkgp"):
        _, cov = posterior(kind, kernels(xt, x), kernels(xt))
        np.testing.assert_array_equal(cov, cov.T)
        assert jnp.linalg.eigvalsh(cov)[0] > -(1e-10 if x64 else 1e-5)


def test_covariance_of_trained_networks_by_sampling_linear_maps(data, close):
    """cov of 'ntk' is that of f_T − A f_X for draws f of the NNGP prior."""
    x, xt, y = data
    _, cov = predict.gp_inference(kernels(x), y)("ntk", kernels(xt, x), kernels(xt))
    joint = nngp(jnp.concatenate([xt, x]), jnp.concatenate([xt, x]))
    a = jnp.linalg.solve(kernels(x).ntk, kernels(xt, x).ntk.T).T
    map_ = jnp.concatenate([jnp.eye(3, dtype=a.dtype), -a], axis=1)
    close(cov, map_ @ joint @ map_.T)


def test_ensemble_mean_is_gradient_flow(data, close):
    x, xt, y = data
    ensemble = predict.gradient_descent_mse_ensemble(kernel_fn, x, y, learning_rate=0.7)
    flow = predict.gradient_descent_mse(kernels(x).ntk, y, learning_rate=0.7)
    for t in (None, 0.0, 3.0, jnp.array([1.0, 50.0])):
        train, test = flow(t, 0.0, 0.0, kernels(xt, x).ntk)
        close(ensemble(t, xt, "ntk"), test)
        close(ensemble(t, None, "ntk"), train)


def test_ensemble_limits(data, close):
    x, xt, y = data
    ensemble = predict.gradient_descent_mse_ensemble(kernel_fn, x, y)
    start = ensemble(0.0, xt, compute_cov=True)
    for kind in ("nngp", "ntk"):
        close(getattr(start, kind).mean, jnp.zeros((3, 2)))
        close(getattr(start, kind).covariance, kernels(xt).nngp)
    late = ensemble(1e7, xt, compute_cov=True)
    infinite = ensemble(None, xt, compute_cov=True)
    for a, b in zip(jax.tree.leaves(late), jax.tree.leaves(infinite), strict=True):
        close(a, b, 10)
    on_train = ensemble(jnp.array([0.0, 2.0]), None, "ntk", compute_cov=True)
    as_test = ensemble(jnp.array([0.0, 2.0]), x, "ntk", compute_cov=True)
    close(on_train.mean, as_test.mean)
    close(on_train.covariance, as_test.covariance)
    close(on_train.covariance[0], kernels(x).nngp)
    gauss = ensemble(2.0, None, "nngp", compute_cov=True)
    close(gauss.covariance, ensemble(2.0, x, "nngp", compute_cov=True).covariance)


def test_results_are_named(data):
    x, xt, y = data
    ensemble = predict.gradient_descent_mse_ensemble(kernel_fn, x, y)
    both = ensemble(1.0, xt)
    assert type(both).__name__ == "Gaussians" and both._fields == ("nngp", "ntk")
    assert ensemble(1.0, xt, ("ntk",))._fields == ("ntk",)
    assert type(ensemble(None, xt, ("ntk", "nngp"))) is type(ensemble(1.0, xt, ("ntk", "nngp")))
    with pytest.raises(NotImplementedError, match="'ntkgp'"):
        ensemble(1.0, xt, "ntkgp")


def test_jit_vmap_and_no_leaks(data, close):
    x, xt, y = data
    ensemble = predict.gradient_descent_mse_ensemble(kernel_fn, x, y)
    run = lambda t, xt: ensemble(t, xt, "ntk", True)
    with jax.checking_leaks():
        traced = jax.jit(run)(2.0, xt)
        mapped = jax.vmap(run, (0, None))(jnp.array([1.0, 2.0]), xt)
        infinite = jax.jit(lambda xt: ensemble(None, xt, compute_cov=True))(xt)
    eager = run(2.0, xt)
    for a, b, c in zip(eager, traced, mapped, strict=True):
        close(a, b)
        close(a, c[1])
    eager = ensemble(None, xt, compute_cov=True)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(infinite), strict=True):
        close(a, b)

    def made_inside(x, y):
        inner = predict.gradient_descent_mse_ensemble(kernel_fn, x, y)
        return inner(2.0, xt, "ntk", True), inner(None, xt, "nngp")

    (mean, _), _ = jax.jit(made_inside)(x, y)
    close(mean, run(2.0, xt).mean)
    posterior = lambda y: predict.gp_inference(kernels(x), y)("ntk", kernels(xt, x), kernels(xt))
    close(jax.vmap(posterior)(jnp.stack([y, 2 * y])).mean[1], 2 * posterior(y).mean)


def test_pairs_of_arguments_are_paired_again(data, close):
    x, xt, y = data
    ensemble = predict.gradient_descent_mse_ensemble(kernel_fn, x, y, scale=(2.0, 2.0))
    got = ensemble(None, xt, "nngp", True, scale=(3.0, 3.0))
    exact = predict.gp_inference(4 * kernels(x).nngp, y)(
        "nngp", 6 * kernels(xt, x).nngp, 9 * kernels(xt).nngp
    )
    close(got.mean, exact.mean)
    close(got.covariance, exact.covariance)
    # A pair given once serves all kernels: parameters of a layer, (W, b), are one too.
    close(ensemble(None, xt, "nngp"), ensemble(None, xt, "nngp", scale=(2.0, 2.0)))
    bare = predict.gradient_descent_mse_ensemble(kernel_fn, x, y)
    with pytest.raises(ValueError, match="pass scale both"):
        bare(None, xt, "nngp", scale=(3.0, 3.0))
    mixed = predict.gradient_descent_mse_ensemble(kernel_fn, x, y, scale=None)
    with pytest.raises(ValueError, match="one value, or a pair for each"):
        mixed(None, xt, "nngp", scale=1.0)


def test_errors(data):
    x, xt, y = data
    with pytest.raises(ValueError, match="needs both kernels"):
        predict.gp_inference(kernels(x).ntk, y)("ntk", kernels(xt, x).ntk, kernels(xt).nngp)
    with pytest.raises(ValueError, match="'tnk' is not known"):
        predict.gp_inference(kernels(x), y)("tnk")
    only = Pair(None, kernels(x).ntk)
    with pytest.raises(ValueError, match="k_train_train has no 'nngp' kernel"):
        predict.gp_inference(only, y)("nngp", kernels(xt, x))
