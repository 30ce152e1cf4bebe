"""Points of the contract that no other file of this folder shows: reminders, corners, options."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tangents
from reference import infinite as slow
from tangents import stax

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (3, 4, 2))
Y = jax.random.normal(jax.random.key(1), (2, 4, 2))


# ---- reminders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fan_in", [stax.FanInSum(), stax.FanInProd(), stax.FanInConcat()])
def test_fan_in_reminds_of_independence_at_every_call(fan_in):
    branches = stax.parallel(stax.Dense(1), stax.Dense(1))
    init_fn, apply_fn, kernel_fn = stax.serial(stax.FanOut(2), branches, fan_in)
    for _ in range(2):
        with pytest.warns(UserWarning, match="FanIn layers assume.*independent"):
            kernel_fn(X, Y, "nngp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_fn(init_fn(KEY, X.shape)[1], X)


def test_tied_attention_weights_are_said_in_init():
    with pytest.warns(UserWarning, match="tied weights"):
        stax.GlobalSelfAttention(1, 1, 1, 1)[0](KEY, X.shape)
    untied = stax.GlobalSelfAttention(
        1, 1, 1, 1, linear_scaling=False, attention_mechanism="IDENTITY"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        untied[0](KEY, X.shape)


def test_hermite_reminds_of_unit_norm_at_every_call():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        init_fn, apply_fn, kernel_fn = stax.serial(stax.Dense(1), stax.Hermite(2))
        apply_fn(init_fn(KEY, X.shape)[1], X)
    for _ in range(2):
        with pytest.warns(UserWarning, match="variance 1"):
            kernel_fn(X, Y, "nngp")


# ---- dropout in tiles ----------------------------------------------------------------------------


def test_dropout_is_announced_and_right_in_tiles(rtol):
    layers = stax.Dense(1), stax.Relu(), stax.Dropout(0.6), stax.Dense(1, 1.1)
    kernel_fn = stax.serial(*layers)[2]
    assert kernel_fn.input_req["use_dropout"] is True
    assert stax.serial(*layers[:2])[2].input_req["use_dropout"] is False
    x = X[:, 0]
    for x2 in (None, x + 0, Y[:, 0]):
        tiled = tangents.batch(kernel_fn, batch_size=2, device_count=0)(x, x2, "ntk")
        np.testing.assert_allclose(tiled, kernel_fn(x, x2, "ntk"), rtol=rtol)


# ---- layers --------------------------------------------------------------------------------------


def test_dot_general_without_arrays_is_the_identity():
    _, apply_fn, kernel_fn = stax.serial(stax.Dense(1), stax.DotGeneral())
    params = [(jnp.ones((2, 1)), None), ()]
    np.testing.assert_array_equal(apply_fn(params, X), stax.Dense(1)[1](params[0], X))
    np.testing.assert_array_equal(kernel_fn(X, Y).ntk, stax.Dense(1)[2](X, Y).ntk)


@pytest.mark.parametrize("method", ["linear", jax.image.ResizeMethod.LINEAR])
def test_image_resize_takes_names_and_members(method):
    kernel_fn = stax.serial(stax.Dense(1), stax.ImageResize((-1, 6, -1), method))[2]
    expected = stax.serial(stax.Dense(1), stax.ImageResize((-1, 6, -1), "linear"))[2](X, Y, "nngp")
    np.testing.assert_array_equal(kernel_fn(X, Y, "nngp"), expected)


def test_unshared_convolutions_forget_what_does_not_overlap(rtol):
    """Without biases positions have weights of their own: only equal positions covary."""
    local = stax.ConvLocal(1, (2,), W_std=1.3, b_std=0.2)[2](X, Y)
    shared = stax.Conv(1, (2,), W_std=1.3, b_std=0.2)[2](X, Y)
    eye = jnp.eye(3, dtype=bool)
    for K, expected in ((local.nngp, shared.nngp), (local.ntk, shared.ntk)):
        np.testing.assert_allclose(K, jnp.where(eye, expected, 0.0), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", ["SUM", "CONCAT"])
@pytest.mark.parametrize("values", [False, True])
def test_positional_embeddings_are_noise_of_their_covariance(kind, values, rtol):
    """Softmax attention with embeddings against the formula, position by position."""
    decay = lambda d: jnp.exp(-0.5 * d)
    layer = stax.GlobalSelfAttention(
        1, 1, 1, 1, True, 1.1, 0.9, 1.2, 1.3, 0.4, pos_emb_type=kind, pos_emb_p_norm=1,
        pos_emb_decay_fn=decay, n_chan_pos_emb=3, W_pos_emb_std=0.7, val_pos_emb=values,
    )  # fmt: skip
    got = layer[2](X, Y, "nngp")  # (3, 2, 4, 4)
    places = np.arange(4)
    R = 0.7**2 * np.exp(-0.5 * np.abs(places[:, None] - places))
    embed = (lambda K: K + R) if kind == "SUM" else (lambda K: (2 * K + 3 * R) / 5)

    def weights(x):
        scores = 1.1 * 1.2 * embed(x @ x.T / 2)
        e = np.exp(scores - scores.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    for i, x in enumerate(np.asarray(X)):
        for j, y in enumerate(np.asarray(Y)):
            K = x @ y.T / 2
            K = embed(K) if values else K
            expected = (0.9 * 1.3) ** 2 * weights(x) @ K @ weights(y).T + 0.4**2
            np.testing.assert_allclose(got[i, j], expected, rtol=rtol, atol=rtol)


def test_targets_of_one_dimension_give_answers_of_one_dimension(rtol):
    kernel_fn = stax.serial(stax.Flatten(), stax.Dense(1), stax.Erf(), stax.Dense(1))[2]
    y = jnp.arange(3.0)
    predict_fn = tangents.predict.gradient_descent_mse(kernel_fn(X, None, "ntk"), y, trace_axes=())
    assert predict_fn(None, None, 0.0, kernel_fn(Y, X, "ntk")).shape == (2,)


# ---- gradients at the cusp -----------------------------------------------------------------------


def test_gradient_at_equal_inputs_is_the_symmetric_subgradient(x64):
    """The mean of the one-sided derivatives of the NTK along a line through equality."""
    kernel_fn = stax.serial(stax.Dense(1), stax.Relu(), stax.Dense(1))[2]
    x, step = X[:1, 0], jnp.asarray([[0.3, -0.8]])

    def along(t):
        return kernel_fn(x + t * step, x, "ntk")[0, 0]

    t = 1e-6 if x64 else 1e-3
    right, left = (along(t) - along(0.0)) / t, (along(0.0) - along(-t)) / t
    middle = jax.grad(along)(0.0)
    assert abs(right - left) > 0.01  # there is a cusp
    np.testing.assert_allclose(middle, (right + left) / 2, atol=1e-5 if x64 else 2e-2)
    assert "symmetric subgradient" in stax.Relu.__doc__


# ---- networks by quadrature ----------------------------------------------------------------------


def test_tangent_kernel_of_any_function_by_quadrature(x64):
    x = np.asarray([[0.3, -0.8, 0.5], [-0.4, 0.1, 0.9]])
    K, T = slow.dense(x @ x.T / 3, np.zeros((2, 2)), 1.2, 0.3)
    K, T = slow.pointwise(K, T, np.arctan, lambda u: 1 / (1 + u * u))
    K, T = slow.dense(K, T, 0.9, 0.2)
    layers = stax.Dense(1, 1.2, 0.3), stax.Elementwise(jnp.arctan), stax.Dense(1, 0.9, 0.2)
    got = stax.serial(*layers)[2](jnp.asarray(x, float), None, ("nngp", "ntk"))
    np.testing.assert_allclose(got.nngp, K, rtol=1e-9 if x64 else 1e-5)
    np.testing.assert_allclose(got.ntk, T, rtol=1e-9 if x64 else 1e-5)


@pytest.mark.parametrize("sizes", [(0, None), (0, 2), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", ["dense", "pooling"])
def test_batches_without_examples(name, sizes):
    nets = {
        "dense": ((4,), stax.serial(stax.Dense(1), stax.Elu(), stax.Dense(1))),
        "pooling": (
            (4, 4, 2),
            stax.serial(stax.Conv(1, (3, 3)), stax.Relu(), stax.AvgPool((2, 2)), stax.Flatten()),
        ),
    }
    shape, (_, _, kernel_fn) = nets[name]
    x1, x2 = (None if n is None else jnp.ones((n, *shape)) for n in sizes)
    rows, columns = sizes[0], sizes[0] if x2 is None else sizes[1]
    for call in (kernel_fn, jax.jit(kernel_fn, static_argnums=2)):
        found = call(x1, x2, ("nngp", "ntk"))
        assert found.nngp.shape == found.ntk.shape == (rows, columns)
    kernel = kernel_fn(x1, x2)
    assert kernel.shape1[0] == rows and kernel.shape2[0] == columns
    assert kernel.cov1.shape[0] == rows
    assert (kernel.cov2 is None) == (x2 is None)


def test_masked_arrays_are_inputs():
    """As inputs with a mask constant."""
    layers = stax.Conv(1, (3,), padding="SAME", b_std=0.1), stax.Relu(), stax.GlobalAvgPool()
    _, _, kernel_fn = stax.serial(*layers, stax.Dense(1))
    x = np.random.default_rng(0).normal(size=(3, 8, 2))
    mask = np.zeros((3, 8, 1), bool)
    mask[0, 5:] = mask[2, 3:] = True
    want = kernel_fn(jnp.where(mask, jnp.nan, x), None, "ntk", mask_constant=np.nan)
    filled = jnp.where(mask, 7.0, x)
    one, two = stax.MaskedArray(filled, mask), stax.MaskedArray(filled[1:], mask[1:])
    np.testing.assert_allclose(kernel_fn(one, None, "ntk"), want, rtol=1e-5)
    np.testing.assert_allclose(kernel_fn(one, two, "ntk"), want[:, 1:], rtol=1e-5)
    with pytest.raises(ValueError, match="batch and a channel axis"):
        kernel_fn(stax.MaskedArray(jnp.ones(3)), None, "ntk")
