"""The layers: signatures, phi against its dual by sampling, errors and warnings."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents import stax

SIGNATURES = {
    "Relu": "(do_stabilize=False)",
    "LeakyRelu": "(alpha, do_stabilize=False)",
    "Abs": "(do_stabilize=False)",
    "ABRelu": "(a, b, do_stabilize=False)",
    "Erf": "(a=1.0, b=1.0, c=0.0)",
    "Sigmoid_like": "()",
    "Sin": "(a=1.0, b=1.0, c=0.0)",
    "Cos": "(a=1.0, b=1.0, c=0.0)",
    "Rbf": "(gamma=1.0)",
    "Gabor": "()",
    "Gelu": "(approximate=False)",
    "Exp": "(a=1, b=1)",
    "Gaussian": "(a=1, b=-1)",
    "ExpNormalized": "(gamma=1, shift=-1, do_clip=False)",
    "Hermite": "(degree)",
    "Monomial": "(degree)",
    "RectifiedMonomial": "(degree)",
    "Polynomial": "(coef)",
    "Sign": "()",
    "Elementwise": "(fn=None, nngp_fn=None, d_nngp_fn=None)",
    "ElementwiseNumerical": "(fn, deg, df=None)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = inspect.signature(getattr(stax, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert (
        str(signature.replace(parameters=bare, return_annotation=signature.empty))
        == (SIGNATURES[name])
    )
    assert name in stax.__all__


def numerical():
    with pytest.warns(UserWarning, match="not estimated"):
        return stax.ElementwiseNumerical(jnp.tanh, 20)


LAYERS = {
    "Relu": stax.Relu,
    "LeakyRelu": lambda: stax.LeakyRelu(0.3),
    "Abs": stax.Abs,
    "ABRelu": lambda: stax.ABRelu(-0.5, 1.5),
    "Sign": stax.Sign,
    "RectifiedMonomial": lambda: stax.RectifiedMonomial(2),
    "step": lambda: stax.RectifiedMonomial(0),
    "Erf": lambda: stax.Erf(1.2, 0.7, 0.4),
    "Sigmoid_like": stax.Sigmoid_like,
    "Gelu": stax.Gelu,
    "Gelu, approximate": lambda: stax.Gelu(approximate=True),
    "Sin": lambda: stax.Sin(1.3, 0.8, 0.5),
    "Cos": lambda: stax.Cos(0.7, 1.4, -0.3),
    "Rbf": lambda: stax.Rbf(0.6),
    "Gabor": stax.Gabor,
    "Exp": lambda: stax.Exp(0.5, 0.4),
    "Gaussian": lambda: stax.Gaussian(1.1, -0.8),
    "Hermite": lambda: stax.Hermite(3),
    "Monomial": lambda: stax.Monomial(2),
    "Polynomial": lambda: stax.Polynomial([0.5, 1.0, -0.3]),
    "ElementwiseNumerical": numerical,
}


@pytest.mark.parametrize("name", LAYERS)
def test_phi_fits_its_dual(name):
    """Mean of phi(u) phi(v) and phi'(u) phi'(v) over many Gaussian pairs, to five sigma."""
    node = LAYERS[name]().node
    n = 200_000
    x, y = jax.random.normal(jax.random.key(0), (2, n))
    u, v = 0.9 * x, 0.5 * x + 0.8 * y
    c, v1, v2 = (jnp.asarray(a, x.dtype) for a in (0.45, 0.81, 0.89))

    def phi(x):
        return node.apply((), x)

    dual = node.kernel.dual(node.hyper, c, v1, v2)
    (fu, du), (fv, dv) = (jax.jvp(phi, (x,), (jnp.ones_like(x),)) for x in (u, v))
    for sample, exact in ((fu * fv, dual.nngp), (du * dv, dual.d_nngp)):
        error = 5 * float(jnp.std(sample)) / n**0.5
        allowed = 1e-3 if "approximate" in name else 1e-6
        assert abs(float(jnp.mean(sample) - exact)) <= error + allowed


def kernel(layer, x, get="ntk"):
    return stax.serial(stax.Dense(1, 1.2, 0.1), layer, stax.Dense(1, 1.1))[2](x, None, get)


X = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5], [-1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])


def test_ntk_is_zero_through_a_sign(rtol):
    both = kernel(stax.Sign(), jnp.asarray(X, float), ("nngp", "ntk"))
    np.testing.assert_allclose(both.ntk, both.nngp, rtol=rtol)  # the last layer's own


def test_kernel_is_differentiable_in_the_hyperparameters(rtol):
    """Under jit, by a tracer: against the difference of two values."""
    x = jnp.asarray(X, float)

    def total(alpha):
        return jnp.sum(kernel(stax.LeakyRelu(alpha), x))

    slope = jax.jit(jax.grad(total))(0.3)
    h = 1e-4 if rtol < 1e-6 else 1e-2
    np.testing.assert_allclose(
        slope, (total(0.3 + h) - total(0.3 - h)) / (2 * h), rtol=1e-6 if rtol < 1e-6 else 1e-3
    )


def test_do_stabilize_changes_nothing_but_large_variances_do_not_overflow(x64):
    x = jnp.asarray(1e15 * X, jnp.float32)  # variances of 1e30: their product is not a float32
    got = kernel(stax.Relu(do_stabilize=True), x, "nngp")
    assert np.all(np.isfinite(got))
    np.testing.assert_array_equal(got, kernel(stax.Relu(), x, "nngp"))
    small = kernel(stax.Relu(), jnp.asarray(X, jnp.float32), "nngp")
    if not x64:  # the bias vanishes beside 1e30, so compare where it counts little
        np.testing.assert_allclose(got[3, 3] / 1e30, small[3, 3], rtol=1e-2)


def test_input_must_be_gaussian():
    x = jnp.asarray(X, float)
    for layers in ((stax.Relu(),), (stax.Dense(1), stax.Erf(), stax.Erf())):
        with pytest.raises(ValueError, match=r"must be Gaussian.*Dense, Conv"):
            stax.serial(*layers)[2](x, None, "nngp")


def test_sides_that_are_missing():
    x = jnp.asarray(X, float)
    with pytest.raises(NotImplementedError, match="no finite-width apply_fn"):
        stax.ExpNormalized()[1]((), x)
    with pytest.raises(ValueError, match="give fn"):
        stax.Elementwise()
    with pytest.raises(NotImplementedError, match="without fn"):
        stax.Elementwise(nngp_fn=lambda c, v1, v2: c, d_nngp_fn=lambda c, v1, v2: c)[1]((), x)
    with pytest.raises(NotImplementedError, match="without nngp_fn"):
        kernel(stax.Elementwise(jnp.tanh, d_nngp_fn=lambda c, v1, v2: c), x)


def test_elementwise_is_named_after_its_function():
    def swish(x):
        return x * jax.nn.sigmoid(x)

    assert stax.Elementwise(swish).node.name == "swish"
    assert stax.Elementwise(nngp_fn=swish, d_nngp_fn=swish).node.name == "Elementwise"


def test_elementwise_warns_where_it_differentiates():
    with pytest.warns(UserWarning, match="automatic differentiation"):
        stax.Elementwise(nngp_fn=lambda c, v1, v2: c)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: stax.Monomial(6), NotImplementedError),
        (lambda: stax.Monomial(-1), NotImplementedError),
        (lambda: stax.RectifiedMonomial(-1), ValueError),
        (lambda: stax.Hermite(-1), ValueError),
        (lambda: stax.Polynomial([]), ValueError),
        (lambda: stax.ElementwiseNumerical(jnp.tanh, 0), ValueError),
    ],
)
def test_arguments_out_of_range(make, error):
    with pytest.raises(error, match=r"degree=|coef|deg="):
        make()


def test_rectified_monomials_stack_without_nan():
    x = jnp.asarray(X, float)
    layers = [stax.Dense(1), stax.RectifiedMonomial(2), stax.Dense(1), stax.RectifiedMonomial(2)]
    both = stax.serial(*layers, stax.Dense(1))[2](x, None, ("nngp", "ntk"))
    assert np.all(np.isfinite(both.nngp)) and np.all(np.isfinite(both.ntk))
