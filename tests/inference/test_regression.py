"""Kernel regression, evidence, calibration, and the posterior of a trained network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tangents
from tangents import stax
from tangents._inference import network_posterior

N, C = 12, 2


def kernel(a, b, width=0.7):
    return jnp.exp(-((a[:, None, :] - b[None, :, :]) ** 2).sum(-1) / (2 * width**2))


@pytest.fixture
def data():
    rng = np.random.default_rng(3)
    array = lambda a: jnp.asarray(a, jnp.result_type(float))
    x = rng.uniform(-2, 2, size=(N, 2))
    y = np.sin(2 * x) + 0.1 * rng.normal(size=(N, C))
    return array(x), array(y), array(rng.uniform(-2, 2, size=(5, 2)))


def test_leave_one_out_is_refitting(data, rtol):
    x, y, _ = data
    k, ridge = kernel(x, x), 0.05
    means, variances = tangents.leave_one_out(k, y, ridge)
    for i in range(0, N, 4):
        keep = jnp.array([j for j in range(N) if j != i])
        fit = tangents.fit_kernel_regression(k[keep][:, keep], y[keep], ridge)
        mean, variance = fit.predict(k[i : i + 1, keep], k[i : i + 1, i])
        np.testing.assert_allclose(means[i], mean[0], rtol=10 * rtol, atol=10 * rtol)
        np.testing.assert_allclose(variances[i], variance[0], rtol=100 * rtol, atol=10 * rtol)


def test_evidence_is_the_dense_density(data, rtol):
    x, y, _ = data
    k = kernel(x, x)
    a = 1.7 * (np.asarray(k, np.float64) + 0.1 * np.eye(N))
    sign, logdet = np.linalg.slogdet(a)
    y64 = np.asarray(y, np.float64)
    exact = -0.5 * (np.sum(y64 * np.linalg.solve(a, y64)) + C * logdet + N * C * np.log(2 * np.pi))
    assert sign == 1
    got = tangents.log_marginal_likelihood(k, y, 0.1, 1.7)
    np.testing.assert_allclose(got, exact, rtol=rtol)
    fit = tangents.fit_kernel_regression(k, y, 0.1, scale=1.7)
    np.testing.assert_allclose(fit.log_marginal_likelihood, exact, rtol=rtol)


def test_gradients_of_the_evidence(data, x64):
    x, y, _ = data

    def evidence(h):
        return tangents.log_marginal_likelihood(h[2] * kernel(x, x, h[0]), y, h[1])

    h = jnp.array([0.7, 0.1, 1.3])
    gradient = jax.jit(jax.grad(evidence))(h)
    step = 1e-5 if x64 else 1e-2
    for i in range(3):
        e = jnp.zeros(3).at[i].set(step)
        numeric = (evidence(h + e) - evidence(h - e)) / (2 * step)
        np.testing.assert_allclose(gradient[i], numeric, rtol=1e-6 if x64 else 3e-2)


def network_kernel(depth, W_std, b_std):
    layers = [stax.Dense(1, W_std, b_std), stax.Relu()] * depth + [stax.Dense(1, W_std, b_std)]
    return stax.serial(*layers)[2]


def test_gradients_of_the_evidence_of_a_network(data, x64):
    x, y, _ = data

    def evidence(h):
        k = network_kernel(2, h["W_std"], h["b_std"])(x, None, "nngp")
        return tangents.log_marginal_likelihood(k, y, h["noise"])

    h = {"W_std": 1.3, "b_std": 0.4, "noise": 0.2}
    value, gradient = jax.jit(jax.value_and_grad(evidence))(h)
    run, step = jax.jit(evidence), 1e-5 if x64 else 3e-2
    for name in h:
        up, down = ({**h, name: h[name] + s} for s in (step, -step))
        numeric = (run(up) - run(down)) / (2 * step)
        np.testing.assert_allclose(gradient[name], numeric, rtol=1e-6 if x64 else 5e-2)
    # Kernels can be learned: a step along the gradient raises the evidence.
    length = 1e-2 / np.sqrt(sum(float(g) ** 2 for g in gradient.values()))
    assert run({name: h[name] + length * gradient[name] for name in h}) > value


def test_evidence_finds_the_depth():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(60, 2))
    x = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.result_type(float))
    depths = (1, 4, 12)
    kernels = [network_kernel(d, np.sqrt(2), 0.2)(x, None, "nngp") for d in depths]
    for true, k in enumerate(kernels):
        factor = np.linalg.cholesky(np.asarray(k, np.float64) + 1e-2 * np.eye(len(x)))
        y = jnp.asarray(factor @ rng.normal(size=(len(x), 30)), k.dtype)
        evidences = [tangents.log_marginal_likelihood(k, y, 1e-2) for k in kernels]
        assert int(np.argmax(evidences)) == true


def test_scale_and_ridge_are_maxima(data):
    x, y, _ = data
    # Noise that no kernel of this width explains, so that the best ridge is not zero.
    y = y + jnp.asarray(np.random.default_rng(9).normal(size=y.shape), y.dtype)
    k = kernel(x, x, 1.5)
    fit = tangents.fit_kernel_regression(k, y, "marginal-likelihood")
    best = fit.log_marginal_likelihood
    for factor in (0.8, 1.25):
        for ridge, scale in ((factor * fit.ridge, fit.scale), (fit.ridge, factor * fit.scale)):
            assert tangents.log_marginal_likelihood(k, y, ridge, scale) < best
    by_error = tangents.fit_kernel_regression(k, y, "leave-one-out")
    for ridge in jnp.logspace(-4, 1, 12):
        means, _ = tangents.leave_one_out(k, y, ridge)
        assert by_error.leave_one_out_error < 1.01 * jnp.mean((means - y) ** 2)
    chosen = tangents.fit_kernel_regression(k, y, ridges=jnp.array([0.3, 5.0]))
    assert float(chosen.ridge) in (np.asarray(0.3, k.dtype), np.asarray(5.0, k.dtype))


@pytest.mark.parametrize("criterion", ["marginal-likelihood", "leave-one-out"])
def test_small_noise_beside_a_large_eigenvalue(criterion):
    # Rounding in float32 as bounded for the worst case, n ε λ_max, is far above the best ridge.
    rng = np.random.default_rng(4)
    x = np.sort(rng.uniform(-1, 1, size=200))
    k = 30 + np.exp(-3 * np.abs(x[:, None] - x))
    y = np.sin(9 * x) + 0.03 * rng.normal(size=len(x))
    fit = tangents.fit_kernel_regression(jnp.asarray(k), jnp.asarray(y), criterion)

    def loss(ridge):
        inverse = np.linalg.inv(k + ridge * np.eye(len(x)))
        solved = inverse @ y
        if criterion == "leave-one-out":
            return np.mean((solved / inverse.diagonal()) ** 2)
        return (len(x) * np.log(y @ solved) - np.linalg.slogdet(inverse)[1]) / 2

    ridges = np.geomspace(1e-6, 1, 200)
    losses = [loss(r) for r in ridges]
    bound = len(x) * np.finfo(np.float32).eps * np.linalg.eigvalsh(k)[-1]
    assert ridges[np.argmin(losses)] < bound / 2
    # A tenth of a nat, or half a percent of the error.
    assert loss(float(fit.ridge)) < min(losses) + 5e-3 * abs(min(losses))


def test_predictions_are_the_posterior(data, rtol):
    x, y, xt = data
    k, k_td, k_tt = kernel(x, x), kernel(xt, x), kernel(xt, xt)
    fit = jax.jit(tangents.fit_kernel_regression)(k, y, 0.2)
    got = fit.predict(k_td, k_tt)
    exact = tangents.predict.gp_inference(k, y, 0.2, True)("nngp", k_td, k_tt)
    np.testing.assert_allclose(got.mean, exact.mean, rtol=10 * rtol, atol=10 * rtol)
    np.testing.assert_allclose(got.covariance, exact.covariance, rtol=10 * rtol, atol=10 * rtol)
    variances = fit.predict(k_td, jnp.diagonal(k_tt), noise=True).covariance
    np.testing.assert_allclose(variances, jnp.diagonal(exact.covariance) + 0.2, rtol=10 * rtol)
    with pytest.raises(ValueError, match=r"fitted on 12 examples: pass \(m, 12\)"):
        fit.predict(k_td.T)


def test_noiseless_fit_interpolates(data, x64):
    x, y, _ = data
    k = kernel(x, x, 0.4)
    mean, variance = tangents.fit_kernel_regression(k, y, 0.0).predict(k, jnp.diagonal(k))
    tol = 1e-8 if x64 else 1e-3
    np.testing.assert_allclose(mean, y, atol=tol)
    np.testing.assert_allclose(variance, 0, atol=tol)
    assert (variance >= 0).all()


def test_calibration_of_true_gaussians():
    rng = np.random.default_rng(0)
    mean = jnp.asarray(rng.normal(size=(4000, 2)))
    variance = jnp.asarray(rng.uniform(0.5, 2, size=4000))
    noise = jnp.asarray(rng.normal(size=(4000, 2)))
    y = mean + jnp.sqrt(variance)[:, None] * noise
    good = tangents.calibration(mean, variance, y)
    assert good.calibration_error < 0.02 and abs(good.chi2 - 1) < 0.06
    bold = tangents.calibration(mean, variance / 4, y)
    assert bold.calibration_error > 0.1 and bold.nll > good.nll and bold.chi2 > 3.5
    with pytest.raises(ValueError, match="need one shape"):
        tangents.calibration(mean, variance, y[:, 0])


def test_class_probabilities_by_sampling():
    mean = jnp.array([[0.3, -0.2, 0.5], [2.0, 0.0, 0.0]])
    variance = jnp.array([0.4, 1.0])
    draws = mean + jnp.sqrt(variance)[:, None] * jax.random.normal(jax.random.key(0), (20000, 2, 3))
    sampled = jax.nn.one_hot(jnp.argmax(draws, -1), 3).mean(0)
    np.testing.assert_allclose(tangents.class_probabilities(mean, variance), sampled, atol=0.015)


def test_class_calibration():
    probabilities = jnp.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    labels = jnp.array([0, 1, 1])
    got = tangents.class_calibration(probabilities, labels, bins=10)
    np.testing.assert_allclose(got.accuracy, 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(got.nll, -np.log([0.9, 0.4, 0.8]).mean(), rtol=1e-6)
    np.testing.assert_allclose(got.calibration_error, (0.1 + 0.6 + 0.2) / 3, rtol=1e-6)
    with pytest.raises(ValueError, match=r"pass \(m, c\) and \(m,\)"):
        tangents.class_calibration(probabilities, probabilities)


def network(params, x):
    w1, w2 = params
    return jnp.tanh(x @ w1) @ w2


def test_posterior_of_a_network_is_the_dense_one(data, x64, monkeypatch):
    x, y, xt = data
    operator, dense = tangents.ntk_operator, []

    def watched(*args, **kwargs):
        made = operator(*args, **kwargs)
        whole = type(made).materialise
        monkeypatch.setattr(
            type(made), "materialise", lambda op: dense.append(op.shape) or whole(op)
        )
        monkeypatch.setattr(network_posterior, "ntk_operator", operator)
        return made

    monkeypatch.setattr(network_posterior, "ntk_operator", watched)
    keys = jax.random.split(jax.random.key(0))
    params = (jax.random.normal(keys[0], (2, 16)), jax.random.normal(keys[1], (16, C)) / 4)
    rtol = 1e-10 if x64 else 1e-5
    posterior = tangents.network_posterior(
        network, params, x, y, noise=0.3, prior_variance=0.5, rtol=rtol
    )
    jacobian = lambda x: jnp.concatenate(
        [a.reshape(x.shape[0] * C, -1) for a in jax.tree.leaves(jax.jacobian(network)(params, x))],
        axis=1,
    )
    j, jt = jacobian(x), jacobian(xt)
    # The same posterior in weight space: precision JᵀJ/σ² + 1/v.
    precision = j.T @ j / 0.3 + jnp.eye(j.shape[1]) / 0.5
    covariance = jt @ jnp.linalg.solve(precision, jt.T)
    shift = jnp.linalg.solve(precision, j.T @ (y - network(params, x)).ravel() / 0.3)
    mean = network(params, xt) + (jt @ shift).reshape(-1, C)
    tol = 1e-7 if x64 else 2e-3
    got = posterior.predict(xt, full_covariance=True, chunk=5)
    np.testing.assert_allclose(got.mean, mean, rtol=tol, atol=tol)
    np.testing.assert_allclose(got.covariance, covariance, rtol=tol, atol=tol)
    variances = posterior.predict(xt).covariance
    np.testing.assert_allclose(variances.ravel(), jnp.diagonal(covariance), rtol=tol, atol=tol)
    # Nothing wants the training kernel as a matrix.
    assert dense and (N * C, N * C) not in dense
    with pytest.raises(ValueError, match="must be positive"):
        tangents.network_posterior(network, params, x, noise=0.0)
