"""Every plan gives what the trivial plan gives."""

import contextlib

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from tangents import stax
from tangents._infinite import executors

X = jax.random.normal(jax.random.key(0), (3, 8, 8, 2))
Y = jax.random.normal(jax.random.key(1), (2, 8, 8, 2))
FIELDS = ("nngp", "ntk", "cov1")


@contextlib.contextmanager
def using(executor):
    executors.register(executor)
    try:
        yield executor
    finally:
        executors.unregister(executor)


def planned(executor, kernel_fn, *args, **kwargs):
    """The kernel by an executor that takes the request, and by the trivial plan."""
    with using(executors.Trivial()):
        plain = kernel_fn(*args, get=FIELDS, **kwargs)
    with using(executor):
        assert f"({executor.name})" in kernel_fn.explain(*args)
        return kernel_fn(*args, get=FIELDS, **kwargs), plain


def assert_close(got, plain, x64):
    for field, a, b in zip(FIELDS, got, plain, strict=True):
        scale = float(jnp.abs(b).max())
        # Near-equal positions of float32 pooling networks have half of the digits, in any plan.
        np.testing.assert_allclose(
            a, b, rtol=0, atol=(1e-12 if x64 else 1e-4) * scale, err_msg=field
        )


def conv(strides=(1, 1), padding="SAME", size=(3, 3), b_std: float | None = 0.1):
    return stax.Conv(1, size, strides, padding, W_std=1.3, b_std=b_std)


def residual(strides):
    main = stax.serial(stax.Relu(), conv(strides), stax.Relu(), conv())
    return stax.serial(
        stax.FanOut(2), stax.parallel(main, conv(strides, size=(1, 1))), stax.FanInSum()
    )


def shortcut():
    main = stax.serial(stax.Relu(), conv(b_std=None))
    return stax.serial(stax.FanOut(2), stax.parallel(main, stax.Identity()), stax.FanInSum())


def standard():
    return stax.Conv(1, (3, 3), padding="SAME", W_std=1.3, b_std=0.1, parameterization="standard")


def pool(padding="VALID", size=(2, 2)):
    return stax.AvgPool(size, (2, 2), padding)


BODIES = {
    "conv": lambda: stax.serial(conv(), stax.Relu(), conv()),
    "strides": lambda: stax.serial(conv((2, 1)), stax.Erf(), conv((1, 2), b_std=None)),
    "valid": lambda: stax.serial(conv(padding="VALID"), stax.Relu(), conv(padding="VALID")),
    "torus": lambda: stax.serial(conv(padding="CIRCULAR"), stax.Abs(), conv(padding="CIRCULAR")),
    "residual": lambda: stax.serial(conv(), residual((2, 2)), residual((1, 1))),
    "repeat": lambda: stax.serial(conv(), stax.repeat(stax.serial(stax.Relu(), conv()), 3)),
    "pool": lambda: stax.serial(conv(), stax.Relu(), pool(), conv(), stax.Relu()),
    "overlapping": lambda: stax.serial(conv(), stax.Relu(), pool("SAME", (3, 3)), conv()),
    "whole": lambda: stax.serial(
        conv(padding="VALID"),
        stax.Relu(),
        stax.AvgPool((6, 6)),
        conv(),
        stax.LeakyRelu(0.3),
        conv(),
    ),
    "rows": lambda: stax.serial(conv(), stax.Abs(), stax.SumPool((8, 2), (1, 2)), conv()),
    "one by one": lambda: stax.serial(stax.Dense(1, 1.2, 0.3), stax.LeakyRelu(0.2), conv()),
}
APART = {  # where values alone are computed by programs of their own
    "shortcuts": lambda: stax.serial(conv(), shortcut(), shortcut(), conv((2, 2)), shortcut()),
    "standard": lambda: stax.serial(standard(), stax.Relu(), standard(), standard()),
    "run": lambda: stax.serial(conv(), *[stax.Relu(), conv()] * 10),
    "poolings": lambda: stax.serial(
        conv(), stax.Relu(), stax.AvgPool((2, 2), (2, 2)), stax.AvgPool((2, 1)), conv()
    ),
}
ENDS = {
    "flat": lambda: stax.serial(stax.Relu(), stax.Flatten(), stax.Dense(1, 1.1, 0.2)),
    "global": lambda: stax.serial(stax.Relu(), stax.GlobalAvgPool(), stax.Dense(1, 1.1, 0.2)),
    "deep end": lambda: stax.serial(
        stax.GlobalAvgPool(), stax.Dense(1, 1.3, 0.1), stax.Relu(), stax.Dense(1)
    ),
}


QUICK = {
    ("conv", "flat"),
    ("strides", "global"),
    ("torus", "flat"),
    ("residual", "global"),
    ("shortcuts", "global"),
    ("poolings", "global"),
    ("pool", "deep end"),
    ("whole", "global"),
}


@pytest.mark.parametrize(
    ("body", "end"),
    [
        pytest.param(body, end, marks=() if (body, end) in QUICK else pytest.mark.slow)
        for body in (*BODIES, *APART)
        for end in ENDS
    ],
)
def test_planes_are_the_trivial_plan(body, end, x64):
    body_end = stax.serial((BODIES | APART)[body](), ENDS[end]())
    if body == "pool" and end != "deep end":
        body_end = stax.serial(BODIES[body](), conv(), ENDS[end]())
    assert_close(*planned(executors.ByPlanes(least=1, group=2), body_end[2], X), x64)


@pytest.mark.parametrize(
    "body", ["pool", *(pytest.param(b, marks=pytest.mark.slow) for b in ("strides", "residual"))]
)
@pytest.mark.parametrize("end", ["global", pytest.param("flat", marks=pytest.mark.slow)])
def test_planes_of_two_batches(body, end, x64):
    kernel_fn = stax.serial(BODIES[body](), conv(), ENDS[end]())[2]
    assert_close(*planned(executors.ByPlanes(least=1), kernel_fn, X, Y), x64)
    # Equal by value: entries of an example with itself are exact as with x2=None.
    assert_close(*planned(executors.ByPlanes(least=1), kernel_fn, X, X + 0), x64)


@pytest.mark.parametrize(
    ("n", "group"),
    [(3, 2), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((1, 1), (3, 1), (3, 4)))],
)
def test_one_loop_is_the_two_that_are_differentiated(n, group, x64):
    """Groups in which the pairs (a, a) stand beside others that read their tapes."""
    kernel_fn = stax.serial(BODIES["pool"](), conv(), ENDS["global"]())[2]

    def kernels(x):
        return tuple(kernel_fn(x, None, FIELDS))

    with using(executors.ByPlanes(least=1, group=group)):
        assert "custom_jvp" in str(jax.make_jaxpr(kernels)(X[:n]))
        derived, _ = jax.jvp(kernels, (X[:n],), (X[:n],))
        assert_close(kernels(X[:n]), derived, x64)


@pytest.mark.slow
def test_planes_under_vmap(x64):
    kernel_fn = stax.serial(BODIES["pool"](), conv(), ENDS["global"]())[2]
    x = jnp.stack([X[:2], 2 * X[1:]])
    with using(executors.ByPlanes(least=1, group=2)):
        mapped = jax.vmap(lambda x: tuple(kernel_fn(x, None, FIELDS)))(x)
    with using(executors.Trivial()):
        for k, each in enumerate(x):
            assert_close([m[k] for m in mapped], kernel_fn(each, None, FIELDS), x64)


@pytest.mark.slow
@settings(max_examples=20)
@given(
    st.lists(st.sampled_from(sorted(BODIES)), min_size=1, max_size=2),
    st.sampled_from(sorted(ENDS)),
    st.integers(1, 5),
)
def test_random_networks_by_planes(names, end, group):
    x64 = X.dtype == jnp.float64
    bodies = [stax.serial(BODIES[n](), conv()) for n in names]
    kernel_fn = stax.serial(*bodies, ENDS[end]())[2]
    assert_close(*planned(executors.ByPlanes(least=1, group=group), kernel_fn, X), x64)


FLAT = {
    "relu": lambda: stax.serial(stax.Dense(1, 1.3, 0.2), stax.Relu()),
    "erf": lambda: stax.serial(stax.Dense(1, 1.3, 0.2), stax.Erf()),
    "norm": lambda: stax.serial(stax.Dense(1), stax.LayerNorm(), stax.Gelu()),
    "dropout": lambda: stax.serial(stax.Dense(1), stax.Relu(), stax.Dropout(0.7)),
    "residual": lambda: stax.serial(
        stax.Dense(1),
        stax.FanOut(2),
        stax.parallel(stax.serial(stax.Relu(), stax.Dense(1, 1.1, 0.2)), stax.Identity()),
        stax.FanInSum(),
    ),
    "repeat": lambda: stax.serial(
        stax.Dense(1), stax.repeat(stax.serial(stax.Relu(), stax.Dense(1, 1.2, 0.1)), 3)
    ),
}


@pytest.mark.parametrize("name", FLAT)
def test_blocks_are_the_trivial_plan(name, x64):
    kernel_fn = stax.serial(FLAT[name](), stax.Dense(1, 1.1, 0.1))[2]
    x, y = X[:, :4, 0].reshape(6, 4), Y[:, :5, 0].reshape(5, 4)
    blocked = executors.Blocked(least=1, most=6)
    assert_close(*planned(blocked, kernel_fn, x), x64)
    assert_close(*planned(blocked, kernel_fn, x, y), x64)


SPATIAL = {
    "pool": lambda: stax.serial(conv(), stax.Relu(), stax.GlobalAvgPool()),
    "attention": lambda: stax.serial(
        stax.Conv(1, (2, 2), (2, 2)), stax.GlobalSelfAttention(1, 1, 1, 1), stax.GlobalAvgPool()
    ),
    "images": lambda: stax.serial(conv(), stax.Relu()),
}


@pytest.mark.parametrize("name", SPATIAL)
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_images_with_masks(name, masked, x64):
    kernel_fn, x = SPATIAL[name]()[2], X[:, :4, :4]
    if masked:
        x = x.at[0, 0].set(9.0).at[1, :, 2].set(9.0)
    kwargs = {"mask_constant": 9.0} if masked else {}
    assert_close(*planned(executors.Blocked(least=1, most=300), kernel_fn, x, **kwargs), x64)


GRADIENTS = {
    "blocks": lambda: (executors.Blocked(least=1, most=4), (FLAT["relu"](), stax.Dense(1))),
    "flat": lambda: (executors.ByPlanes(least=1, group=1), (BODIES["conv"](), ENDS["flat"]())),
    "global": lambda: (executors.ByPlanes(least=1), (BODIES["pool"](), conv(), ENDS["global"]())),
}


@pytest.mark.parametrize(
    "case", ["blocks", *(pytest.param(c, marks=pytest.mark.slow) for c in ("flat", "global"))]
)
def test_gradients_through_blocks_and_planes(case, x64):
    executor, layers = GRADIENTS[case]()
    kernel_fn, x = stax.serial(*layers)[2], X[:, 0, 0] if case == "blocks" else X[:2]

    def total(x):
        return jnp.sum(jnp.sin(kernel_fn(x, None, "ntk")))

    gradients = []
    for each in (executors.Trivial(), executor):
        with using(each):
            gradients.append(jax.grad(total)(x))
    scale = float(jnp.abs(gradients[0]).max())
    np.testing.assert_allclose(*gradients, rtol=0, atol=(1e-9 if x64 else 2e-3) * scale)


@pytest.mark.slow
def test_gradients_of_two_batches_and_hyperparameters(x64):
    def total(W_std, x, y):
        layers = stax.Conv(1, (3, 3), (1, 1), "SAME", W_std, 0.1), stax.LeakyRelu(W_std / 3), pool()
        kernel_fn = stax.serial(*layers, conv(), stax.Relu(), stax.GlobalAvgPool(), stax.Dense(1))[
            2
        ]
        return jnp.sum(jnp.sin(kernel_fn(x, y, "ntk")))

    gradients = []
    for executor in (executors.Trivial(), executors.ByPlanes(least=1, group=2)):
        with using(executor):
            of_two = jax.grad(total, (0, 1, 2))(jnp.asarray(1.3, X.dtype), X[:2], Y[:1])
            of_one = jax.grad(total)(jnp.asarray(1.3, X.dtype), X[:2], None)
            gradients.append((*of_two, of_one))
    for plain, got in zip(*gradients, strict=True):
        scale = float(jnp.abs(plain).max())
        np.testing.assert_allclose(got, plain, rtol=0, atol=(1e-9 if x64 else 2e-3) * scale)


def test_an_executor_of_ones_own_is_asked_first(x64):
    class Ones(executors.Executor):
        name = "ones"

        def takes(self, request):
            return request.n1 == 3

        def compute(self, request):
            state = executors.Trivial().compute(request)
            return state.replace(tile=state.tile._replace(cov12=jnp.ones((3, 3))))

        def describe(self, request):
            return "a seam"

    kernel_fn = stax.serial(stax.Dense(1), stax.Relu())[2]
    x = X[:, 0, 0]
    with using(Ones()):
        assert "computed (ones): a seam" in kernel_fn.explain(x)
        assert bool((kernel_fn(x, None, "nngp") == 1).all())
        assert not bool((kernel_fn(x[:2], None, "nngp") == 1).all())
    assert not bool((kernel_fn(x, None, "nngp") == 1).all())


def test_windows_between_nonlinearities(x64):
    """A program that XLA on CPU once computed wrong, by as much as a quarter."""
    from tangents._infinite.layers.window import Padding, Window, window_sum

    assert Padding("SAME") and Window(3, 1, 1, 1)
    conv_relu = stax.serial(conv(), stax.Relu(), conv(), stax.Relu(), stax.Flatten())
    variances = conv_relu[2](X, None, "cov1")

    def average(v):
        ws = [Window(3, 1, 1, 1)] * 2
        return 1.3**2 / 9 * window_sum(v, (1, 2), ws) + 0.1**2

    expected = jnp.mean(average(average(jnp.mean(X * X, -1)) / 2) / 2, axis=(1, 2))
    np.testing.assert_allclose(variances, expected, rtol=1e-12 if x64 else 1e-5)
    with using(executors.ByPlanes(least=1)):
        np.testing.assert_allclose(
            conv_relu[2](X, None, "cov1"), expected, rtol=1e-12 if x64 else 1e-5
        )


def test_runs_of_equal_layers_are_compiled_once(x64):
    """Under tracing they are a loop: as many layers as one likes, each with its own numbers."""
    x = X[:, :4, 0].reshape(6, 4)

    def network(stds):
        hidden = [stax.serial(stax.Dense(3, s, 0.1), stax.Relu()) for s in stds]
        return stax.serial(*hidden, stax.Dense(1))[2]

    def total(stds):
        return jnp.sum(jnp.sin(network(stds)(x, None, "ntk")))

    def equations(depth):
        return str(jax.make_jaxpr(total)(jnp.linspace(1, 1.5, depth))).count("\n")

    assert equations(12) < equations(6) + 6 * 5  # to take and stack each W_std

    stds = [1.2, 1.5, 1.1, 1.3, 1.4]
    layer_by_layer = network(stds)(x, None, ("nngp", "ntk"))
    looped = jax.jit(lambda stds: network(stds)(x, None, ("nngp", "ntk")))(stds)
    for a, b in zip(looped, layer_by_layer, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12 if x64 else 1e-5)
    step = 1e-5 if x64 else 1e-2
    gradient = jax.grad(total)(stds)
    for k in range(5):
        plus, minus = (total([s + e * (i == k) for i, s in enumerate(stds)]) for e in (step, -step))
        slope = (plus - minus) / (2 * step)
        np.testing.assert_allclose(gradient[k], slope, rtol=1e-6 if x64 else 2e-2, atol=1e-3)


def test_gradients_take_no_memory_for_depth():
    """Blocks are computed again on the way back: a few arrays of all pairs, whatever the depth."""
    layers = [layer for _ in range(10) for layer in (stax.Dense(1, 1.4, 0.1), stax.Relu())]
    kernel_fn, x = stax.serial(*layers, stax.Dense(1))[2], jnp.ones((600, 5))
    assert "(blocked)" in kernel_fn.explain(x)
    gradient = jax.grad(lambda x: jnp.sin(kernel_fn(x, None, "ntk")).sum())
    temporary = jax.jit(gradient).lower(x).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 10 * 600 * 600 * x.dtype.itemsize
