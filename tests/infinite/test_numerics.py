"""float32 against float64: to its own digits wherever inputs lie."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents import stax
from tangents._infinite import executors


@pytest.fixture(autouse=True)
def double(x64):
    if not x64:
        pytest.skip("needs float64 to compare with")


@contextlib.contextmanager
def single():
    with jax.enable_x64(False):
        yield


# Hyperparameters are exact in float32 like the inputs: rounded ones add 1e-7 in every layer.


def families(shape, seed=0, offset=0.0):
    """float32 inputs, as float64: a point with equal, near, parallel, orthogonal, opposite ones."""
    rng = np.random.default_rng(seed)
    x, e = rng.normal(size=(2, np.prod(shape))) + offset
    e -= (e @ x) / (x @ x) * x
    e *= np.linalg.norm(x) / np.linalg.norm(e)
    near = [r * (x + d * e) for d in (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0) for r in (1, 1.37)]
    others = [e, -x, -1.5 * (x + 1e-4 * e), rng.normal(size=x.shape) + offset]
    points = np.stack([x, *near, *others]).astype(np.float32)
    return points.astype(np.float64).reshape((-1, *shape))


def worst(network, x, executor=None):
    """Of x with itself and as two batches: max |dT_ab| / sqrt(T_aa T_bb) over the pairs, and the
    smallest eigenvalue over the largest."""
    executor = executors.Trivial() if executor is None else executor
    executors.register(executor)
    try:
        exact = np.asarray(network()[2](jnp.asarray(x), None, "ntk"))
        with single():
            x32 = jnp.asarray(x, jnp.float32)
            got = [network()[2](x32, x2, "ntk") for x2 in (None, jnp.array(x32))]
            assert all(g.dtype == jnp.float32 for g in got)
            got = [np.asarray(g, np.float64) for g in got]
    finally:
        executors.unregister(executor)
    size = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert all(np.isfinite(g).all() for g in got)
    values = np.linalg.eigvalsh((got[0] + got[0].T) / 2)
    return max(np.max(np.abs(g - exact) / size) for g in got), values[0] / values[-1]


def check(network, x, executor=None, bound=2e-6):
    """The bounds of networks that carry their digits through."""
    error, smallest = worst(network, x, executor)
    assert error <= bound
    assert smallest >= -1e-6


def dense(phi, depth, b_std=0.125):
    def network():
        layers = [layer for _ in range(depth) for layer in (stax.Dense(1, 1.375, b_std), phi())]
        return stax.serial(*layers, stax.Dense(1, 1.125, 0.125))

    return network


OTHERS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("Abs", "LeakyRelu", "Gelu", "Mish", "SiLU", "Softplus", "Elu", "Selu")
]


@pytest.mark.parametrize("depth", [3, 20])
@pytest.mark.parametrize("name", ["Relu", "Erf", "Tanh", *OTHERS])
def test_dense_networks(name, depth):
    phi = {"LeakyRelu": lambda: stax.LeakyRelu(0.25)}.get(name, getattr(stax, name))
    check(dense(phi, depth), families((50,)))


def test_gap_of_a_tabulated_kink():
    """The slope of Selu jumps at 0: without the gap the error is 1e-4."""
    check(dense(stax.Selu, 3), families((50,)))


@pytest.mark.parametrize(
    ("name", "depth", "bound"),
    [
        ("HardTanh", 3, 1e-5),
        pytest.param("relu6", 20, 1e-5, marks=pytest.mark.slow),
        pytest.param("HardTanh", 20, 1e-3, marks=pytest.mark.slow),
    ],
)
def test_kinks_away_from_zero(name, depth, bound):
    """Without the gap errors are 9e-4, 2e-3 and 3e-2, and eigenvalues -2e-3 of the largest."""
    phi = {"relu6": lambda: stax.Elementwise(jax.nn.relu6)}.get(name, stax.HardTanh)
    check(dense(phi, depth), families((50,)), bound=bound)


def test_dense_networks_of_positive_inputs_in_blocks():
    """Means far from zero make all pairs close: the product of matrices is not enough there."""
    x = families((200,), offset=3.0)
    check(dense(stax.Relu, 5), x, executors.Blocked(least=1, most=40))


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("depth", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_flattened_convolutions(depth, planned):
    def network():
        conv = [stax.Conv(1, (3, 3), padding="SAME", W_std=1.375, b_std=0.125), stax.Relu()]
        return stax.serial(*(conv * depth), stax.Flatten(), stax.Dense(1, 1.125, 0.125))

    executor = executors.ByPlanes(least=1) if planned else executors.Trivial()
    check(network, families((5, 4, 2)), executor)


@pytest.mark.slow
def test_flatten_and_go_on():
    def network():
        return stax.serial(
            stax.Conv(1, (3, 3), padding="SAME", W_std=1.375),
            stax.Relu(),
            stax.Flatten(),
            *(stax.Dense(1, 1.375, 0.125), stax.Relu()) * 2,
            stax.Dense(1),
        )

    check(network, families((4, 4, 2)), executors.ByPlanes(least=1))


def residual():
    def branch():
        return [stax.Relu(), stax.Conv(1, (3, 3), padding="SAME", W_std=1.375, b_std=0.125)]

    main = stax.serial(*branch(), *branch())
    shortcut = stax.Conv(1, (1, 1), W_std=0.75)
    return stax.serial(stax.FanOut(2), stax.parallel(main, shortcut), stax.FanInSum())


def test_flattened_residual_networks():
    """Sums of branches carry the gap."""

    def network():
        first = stax.Conv(1, (3, 3), padding="SAME", W_std=1.375)
        return stax.serial(first, residual(), residual(), stax.Relu(), stax.Flatten())

    check(network, families((4, 4, 2)))


def pooled():
    conv = [stax.Conv(1, (3, 3), padding="SAME", W_std=1.375), stax.Relu()]
    return stax.serial(*conv, stax.AvgPool((2, 2), (2, 2)), *conv, stax.GlobalAvgPool())


def attending():
    def block():
        attention = stax.GlobalSelfAttention(1, 1, 1, 1, linear_scaling=True)
        return [attention, stax.Relu(), stax.Dense(1, 1.25)]

    return stax.serial(stax.Dense(1), *block(), *block(), stax.GlobalAvgPool(), stax.Dense(1))


MIXING = {
    "planes": (pooled, (4, 4, 2), executors.ByPlanes(least=1), 2e-6),
    "pooling": (pooled, (4, 4, 2), executors.Trivial(), 2e-6),
    # The softmax of scores as large as these inputs' amplifies a rounding; found: 2.6e-6.
    "attention": (attending, (6, 8), executors.Trivial(), 5e-6),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c == "pooling" else pytest.mark.slow) for c in MIXING]
)
def test_networks_that_mix_positions(case):
    """Near pairs are computed again in float64, and there the error is a hundredth at most."""
    network, shape, executor, bound = MIXING[case]
    x = families(shape)
    check(network, x, executor, bound)
    exact = np.asarray(network()[2](jnp.asarray(x), None, "ntk"))
    with single():
        x32 = jnp.asarray(x, jnp.float32)
        kernel_fn = network()[2]
        once = jax.jit(lambda x: kernel_fn(x, None, "ntk"))(x32)
        again = kernel_fn(x32, None, "ntk")
    near = np.s_[:15, :15]  # the point and what is within 0.1 of it, of any norm
    worst = [np.max(np.abs(np.asarray(k, np.float64) - exact)[near]) for k in (once, again)]
    assert worst[1] <= worst[0] / 100


@pytest.mark.slow
def test_near_pairs_of_two_batches_in_tiles():
    """Groups of near inputs, found wherever they are, in tiles of the budget and with a mask."""
    x = families((4, 4, 2))
    kernel_fn = stax.serial(
        stax.Conv(1, (3, 3), padding="SAME"), stax.Relu(), stax.GlobalAvgPool()
    )[2]
    x[3:6, 0, 0] = 5.0
    arguments = {"get": "nngp", "mask_constant": 5.0, "memory": 2**17}
    exact = np.asarray(kernel_fn(jnp.asarray(x), jnp.asarray(x[::-2]), **arguments))
    with single():
        a, b = jnp.asarray(x, jnp.float32), jnp.asarray(x[::-2], jnp.float32)
        got = np.asarray(kernel_fn(a, b, **arguments), np.float64)
    assert np.max(np.abs(got - exact)) <= 2e-6 * np.max(np.abs(exact))


def test_input_gap_of_products_halves_and_differences():
    """Each of the three ways gives 1 - |cos| as exactly as the angle needs."""
    from tangents._infinite.input_gap import relative_input_gap

    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, 300)) + 2
    for distance in (0.5, 0.05, 1e-3, 1e-5):
        y = x + distance * rng.normal(size=(4, 300))
        a, b = (v.astype(np.float32) for v in (x, y))
        u, v = (
            w / np.linalg.norm(w, axis=1, keepdims=True) for w in (a.astype(float), b.astype(float))
        )
        exact = np.sum((u[:, None] - v[None]) ** 2, -1) / 2
        with single():
            a, b = jnp.asarray(a), jnp.asarray(b)
            cosine = jnp.asarray((u @ v.T).astype(np.float32))
            got = np.asarray(relative_input_gap(a, b, cosine, None), np.float64)
        angle = np.sqrt(2 * exact)
        assert np.all(np.abs(np.sqrt(2 * got) - angle) <= 4e-7), distance


def test_gradients_are_finite_at_equal_and_opposite_inputs():
    x = families((6,))

    def total(x):
        return dense(stax.Relu, 2)()[2](x, None, "ntk").sum()

    for executor in (executors.Trivial(), executors.Blocked(least=1, most=20)):
        executors.register(executor)
        try:
            with single():
                gradient = jax.grad(total)(jnp.asarray(x, jnp.float32))
                assert bool(jnp.isfinite(gradient).all())
        finally:
            executors.unregister(executor)
