"""What must hold of every infinite kernel, whatever its values."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from tangents import stax

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 5, 4, 2))
Y = jax.random.normal(jax.random.key(1), (3, 5, 4, 2))


def close(a, b, rtol, scale=1.0):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)


def leaves_close(a, b, rtol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        close(u, v, rtol)


CNN = stax.serial(
    stax.Conv(1, (3, 2), W_std=1.3, b_std=0.2, padding="SAME"),
    stax.Relu(),
    stax.Conv(1, (2, 2), strides=(2, 1), W_std=1.2),
    stax.LayerNorm(axis=(1, 3)),
    stax.Erf(),
)
NETWORKS = {
    "pooling": stax.serial(CNN, stax.GlobalAvgPool(), stax.Dense(1)),
    "flat": stax.serial(CNN, stax.Flatten(), stax.Dense(1, 1.1, 0.1)),
    "spatial": CNN,
    "attention": stax.serial(
        stax.Conv(1, (2, 2)),
        stax.GlobalSelfAttention(1, 1, 1, 1, pos_emb_type="SUM", W_pos_emb_std=0.5),
        stax.Relu(),
        stax.GlobalAvgPool(),
    ),
    "residual": stax.serial(
        stax.Conv(1, (3, 3), padding="SAME"),
        stax.FanOut(2),
        stax.parallel(
            stax.serial(stax.Relu(), stax.Conv(1, (3, 3), padding="SAME")), stax.Identity()
        ),
        stax.FanInSum(),
        stax.Relu(),
        stax.AvgPool((2, 2), padding="SAME"),
        stax.Flatten(),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_x2_none_is_x2_equal_x1(name, rtol):
    kernel_fn = NETWORKS[name][2]
    one, two = kernel_fn(X), kernel_fn(X, X + 0)
    close(one.nngp, two.nngp, rtol)
    close(one.ntk, two.ntk, rtol, float(jnp.abs(one.ntk).max()))
    assert one.cov2 is None and two.cov2 is not None
    assert bool(one.x1_is_x2) and bool(two.x1_is_x2)
    close(one.cov1, two.cov2, rtol)


@pytest.mark.parametrize("name", NETWORKS)
def test_symmetric_and_positive_semidefinite(name, x64):
    kernel = NETWORKS[name][2](X)
    n_positions = int(np.prod(kernel.nngp.shape[2::2]))
    for K in (kernel.nngp, kernel.ntk):
        order = [0, *range(2, K.ndim, 2), 1, *range(3, K.ndim, 2)]
        matrix = np.asarray(jnp.transpose(K, order)).reshape((4 * n_positions,) * 2)
        np.testing.assert_allclose(matrix, matrix.T, rtol=1e-12 if x64 else 1e-5, atol=1e-6)
        values = np.linalg.eigvalsh(matrix)
        assert values.min() > -(1e-12 if x64 else 1e-5) * values.max()


@pytest.mark.parametrize("name", ["pooling", "flat", "spatial"])
def test_tiles_are_the_whole(name, rtol):
    kernel_fn = NETWORKS[name][2]
    memory = 8_000 if name == "flat" else 160_000  # a few pairs of examples in float64
    if jnp.zeros(()).dtype == jnp.float32:
        memory //= 2
    assert "tiles of" in kernel_fn.explain(X, memory=memory)
    leaves_close(kernel_fn(X), kernel_fn(X, memory=memory), rtol)
    leaves_close(kernel_fn(X, Y), kernel_fn(X, Y, memory=memory), rtol)


def test_progress_counts_tiles():
    seen = []

    def progress(tiles):
        for k, tile in enumerate(tiles):
            seen.append((k, len(tiles)))
            yield tile

    kernel_fn = NETWORKS["flat"][2]
    memory = 8_000 if jnp.zeros(()).dtype == jnp.float64 else 4_000
    leaves_close(kernel_fn(X, memory=memory, progress=progress), kernel_fn(X), 1e-5)
    assert len(seen) > 1 and seen[-1] == (len(seen) - 1, len(seen))


def test_tiles_under_tracing_and_their_gradient(rtol):
    kernel_fn = stax.serial(stax.Dense(1, 1.2, 0.1), stax.Erf(), stax.Dense(1))[2]
    x = X[:, 0, 0]

    def total(x, memory):
        return kernel_fn(x, None, "ntk", memory=memory).sum()

    tiled = jax.jit(jax.value_and_grad(lambda x: total(x, 400)))(x)
    leaves_close(tiled, jax.value_and_grad(lambda x: total(x, None))(x), rtol)


def test_memory_errors_say_what_to_do():
    kernel_fn = NETWORKS["pooling"][2]
    with pytest.raises(ValueError, match="is the least it can be"):
        kernel_fn(X, memory=10)
    mixing = stax.serial(stax.Dense(1), stax.LayerNorm(axis=(0, 1)))[2]
    with pytest.raises(ValueError, match="may mix examples"):
        mixing(X[:, 0, 0], memory="1GiB")


@pytest.mark.parametrize("name", ["pooling", "flat", "residual"])
def test_permuting_examples_permutes_the_kernel(name, rtol):
    kernel_fn = NETWORKS[name][2]
    order = jnp.array([2, 0, 1])
    leaves_close(
        kernel_fn(X, Y[order], ("nngp", "ntk")),
        jax.tree.map(lambda K: K[:, order], kernel_fn(X, Y, ("nngp", "ntk"))),
        rtol,
    )


def test_rotations_of_flat_inputs_do_not_matter(rtol):
    kernel_fn = stax.serial(stax.Dense(1, 1.2, 0.3), stax.Gelu(), stax.Dense(1))[2]
    Q, _ = jnp.linalg.qr(jax.random.normal(KEY, (8, 8)))
    x = X.reshape(10, 16)[:, :8]
    close(kernel_fn(x @ Q, None, "ntk"), kernel_fn(x, None, "ntk"), max(rtol, 1e-8))


def test_translations_do_not_matter_on_a_torus(rtol):
    kernel_fn = stax.serial(
        stax.Conv(1, (3, 3), padding="CIRCULAR"), stax.Relu(), stax.GlobalAvgPool()
    )[2]
    moved = jnp.roll(X, (2, 1), (1, 2))
    close(kernel_fn(moved, Y, "ntk"), kernel_fn(X, Y, "ntk"), rtol)


def test_hyperparameter_gradients(x64):
    x = X[:, 0, 0]

    def total(h):
        W, b, a, eps, rate = h
        _, _, kernel_fn = stax.serial(
            stax.Dense(1, W, b),
            stax.LayerNorm(eps=eps),
            stax.ABRelu(a, 1.0),
            stax.Dropout(rate),
            stax.Dense(1, a, W),
        )
        return kernel_fn(x, None, "ntk").sum()

    h = jnp.array([1.2, 0.3, -0.4, 0.2, 0.7])
    gradient = jax.grad(total)(h)
    step = 1e-5 if x64 else 1e-2
    for i in range(len(h)):
        e = jnp.zeros_like(h).at[i].set(step)
        difference = (total(h + e) - total(h - e)) / (2 * step)
        close(gradient[i], difference, 1e-7 if x64 else 2e-2)


def test_new_hyperparameters_do_not_compile_anew():
    x = X[:, 0, 0]
    traces = []

    def phi_nngp(c, v1, v2):
        traces.append(1)
        return c / (1 + v1 * v2)

    def kernel(W, b):
        layers = stax.Dense(1, W, b), stax.Elementwise(None, phi_nngp, phi_nngp), stax.Dense(1, b)
        return stax.serial(*layers)[2](x, None, "nngp")

    first = kernel(1.1, 0.2)
    seen = len(traces)
    second = kernel(1.7, 0.4)
    assert len(traces) == seen > 0
    assert not np.allclose(first, second)


def test_kernel_fn_under_jit_vmap_and_grad(rtol):
    kernel_fn = NETWORKS["flat"][2]
    whole = kernel_fn(X, Y, "ntk")
    close(jax.jit(lambda x, y: kernel_fn(x, y, "ntk"))(X, Y), whole, max(rtol, 1e-8))
    rows = jax.vmap(lambda x: kernel_fn(x[None], Y, "nngp")[0])(X)
    close(rows, kernel_fn(X, Y, "nngp"), max(rtol, 1e-8))
    gradient = jax.grad(lambda x: kernel_fn(x, None, "ntk").sum())(X)
    assert bool(jnp.isfinite(gradient).all())


def test_whole_programs_agree_with_layer_programs(x64):
    # Under jit all layers are one program; XLA once computed wrong numbers for this one.
    kernel_fn = stax.serial(
        stax.Conv(1, (3, 2), W_std=1.2, b_std=0.1),
        stax.Relu(),
        stax.Conv(1, (2, 2), W_std=1.2, b_std=0.1),
        stax.Erf(),
    )[2]
    layers, program = kernel_fn(X, Y), jax.jit(kernel_fn)(X, Y)
    for field in ("nngp", "ntk", "cov1", "cov2"):
        # Fused, variances are rounded differently in each reader; 1e-8 is the root of that.
        close(getattr(program, field), getattr(layers, field), 1e-8 if x64 else 1e-3)


def test_same_examples_are_exact(x64):
    """E[relu'(u)^2] = 1/2 at equal inputs, so the NTK there is an average of variances."""
    conv = stax.Conv(1, (2, 3), W_std=0.9, b_std=0.2)
    variances = conv[2](X, None, "cov1", diagonal_spatial=True)
    _, _, kernel_fn = stax.serial(conv, stax.Relu(), stax.Flatten(), stax.Dense(1, 1.3, 0.2))
    expected = 2 * 1.3**2 * jnp.mean(variances / 2, axis=(1, 2)) + 0.2**2
    got = jnp.diag(kernel_fn(X, None, "ntk"))
    np.testing.assert_allclose(got, expected, rtol=4e-16 if x64 else 4e-7)


def test_get_forms():
    kernel_fn = NETWORKS["flat"][2]
    assert kernel_fn(X, Y, "NTK").shape == (4, 3)
    pair = kernel_fn(X, Y, ["ntk", "nngp"])
    assert pair._fields == ("ntk", "nngp") and type(pair).__name__ == "AnalyticKernel"
    assert type(kernel_fn(X, Y, ("ntk", "nngp"))) is type(pair)
    assert kernel_fn(X, Y, ("shape1",)).shape1 == (4, 1)
    assert kernel_fn(X, Y, "is_gaussian") is True
    assert kernel_fn(X, Y, "nngp").shape == (4, 3)
    assert kernel_fn(X, Y, "is_reversed") is False
    with pytest.raises(KeyError):
        kernel_fn(X, Y, "nothing")
    with pytest.raises(ValueError, match="non-empty"):
        kernel_fn(X, Y, ())
    with pytest.raises(ValueError, match="unique"):
        kernel_fn(X, Y, ("ntk", "ntk"))


def test_a_kernel_continues(rtol):
    first, second = stax.serial(stax.Dense(1), stax.Relu()), stax.Dense(1, 1.3, 0.1)
    x = X[:, 0, 0]
    leaves_close(second[2](first[2](x)), stax.serial(first, second)[2](x), rtol)
    assert second[2](first[2](x), get="ntk").shape == (4, 4)


def test_kernel_operators_act_as_on_activations(rtol):
    kernel = CNN[2](X, Y)
    leaves_close((kernel * 3.0).ntk, kernel.ntk * 9, rtol)
    close((kernel + 2.0).nngp, kernel.nngp + 4, rtol)
    close((kernel + 2.0).ntk, kernel.ntk, rtol)
    assert (-kernel) is kernel
    part = kernel.slice(slice(1, 3), slice(0, 2))
    leaves_close(part.ntk, kernel.ntk[1:3, :2], rtol)
    assert part.shape1[0] == 2
    assert kernel.reverse().reverse().is_reversed is False
    leaves_close(kernel.reverse().reverse().nngp, kernel.nngp, 0.0)
    row = kernel[:, 0]
    close(row.nngp, kernel.nngp[:, :, 0, 0], rtol)
    close(row.cov1, kernel.cov1[:, 0, 0], rtol)
    swapped = kernel.transpose((1, 0))
    close(swapped.nngp, jnp.transpose(kernel.nngp, (0, 1, 4, 5, 2, 3)), rtol)
    with pytest.raises(AttributeError):
        kernel.nngp = 1


BLOCKS = {
    "dense": lambda: stax.Dense(1, 1.2, 0.1),
    "conv": lambda: stax.Conv(1, (2, 2), W_std=1.3, padding="SAME"),
    "circular": lambda: stax.Conv(1, (3, 2), padding="CIRCULAR", b_std=0.1),
    "local": lambda: stax.ConvLocal(1, (2, 2), padding="SAME"),
    "transposed": lambda: stax.ConvTranspose(1, (2, 2), padding="SAME"),
    "relu": lambda: stax.serial(stax.Dense(1), stax.Relu()),
    "erf": lambda: stax.serial(stax.Dense(1), stax.Erf()),
    "pool": lambda: stax.AvgPool((2, 2), padding="SAME", normalize_edges=True),
    "norm": lambda: stax.RMSNorm(),
    "dropout": lambda: stax.Dropout(0.8),
    "resize": lambda: stax.ImageResize((-1, 4, 5, -1), "linear"),
    "index": lambda: stax.Index(stax.Slice[:, ::2]),
    "attention": lambda: stax.GlobalSelfAttention(1, 1, 1, 1),
    "residual": lambda: stax.serial(
        stax.Dense(1),
        stax.FanOut(2),
        stax.parallel(stax.serial(stax.Relu(), stax.Dense(1)), stax.Identity()),
        stax.FanInSum(),
    ),
    "product": lambda: stax.serial(
        stax.FanOut(2), stax.parallel(stax.Dense(1), stax.Dense(1, 1.2)), stax.FanInProd()
    ),
}
ENDS = {"flat": lambda: stax.Flatten(), "pool": lambda: stax.GlobalAvgPool()}


@settings(max_examples=6)
@given(
    st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    st.sampled_from(sorted(ENDS)),
)
def test_random_networks(names, end):
    """Symmetry, blocks of the batch, layouts and sides agree on any network of these layers."""
    network = stax.serial(*(BLOCKS[n]() for n in names), ENDS[end](), stax.Dense(1))
    x = X[:, :4, :4]
    kernel = network[2](x)
    tolerance = 1e-9 if x.dtype == jnp.float64 else 5e-3
    scale = float(jnp.abs(kernel.ntk).max())
    close(kernel.nngp, kernel.nngp.T, tolerance)
    close(jnp.diag(kernel.nngp), kernel.cov1, tolerance)
    block = network[2](x[:2], x[2:], ("nngp", "ntk"))
    close(block.ntk, kernel.ntk[:2, 2:], tolerance, scale)
    for K in (kernel.nngp, kernel.ntk):
        values = jnp.linalg.eigvalsh((K + K.T) / 2)
        assert float(values[0]) > -tolerance * float(values[-1])


def test_layouts_agree(rtol):
    """Computing all pairs of positions where equal ones would do changes nothing."""
    local = stax.serial(stax.Conv(1, (3, 2), b_std=0.1), stax.Relu(), stax.Conv(1, (2, 2)))[2]
    full = local(X, Y, ("nngp", "ntk"))
    diagonal = local(X, Y, ("nngp", "ntk"), diagonal_spatial=True)
    for K, D in zip(full, diagonal, strict=True):
        close(jnp.einsum("nmaabb->nmab", K), D, rtol)
    whole = NETWORKS["pooling"][2](X, diagonal_batch=False)
    close(whole.cov1, whole.nngp, rtol)


@pytest.mark.parametrize(
    "layers, x, text",
    [
        ((stax.Dense(1), stax.Relu(), stax.Relu()), X, r"layer 2 \(Relu\).*Gaussian.*Dense"),
        ((stax.Relu(),), X, r"layer 0 \(Relu\)"),
        ((stax.Flatten(), stax.GlobalAvgPool()), X, r"layer 1 \(GlobalAvgPool\).*spatial axes"),
        ((stax.Dense(1), stax.Dense(1, channel_axis=1)), X, r"layer 1 \(Dense\).*channel_axis=3"),
        ((stax.FanOut(2), stax.FanInSum()), X, r"layer 1 \(FanInSum\).*Gaussian"),
        ((stax.FanInSum(),), X, r"FanInSum needs a list"),
        (
            (stax.FanOut(2), stax.parallel(stax.Identity(), stax.serial(stax.Relu()))),
            X,
            r"layer 1 \(parallel\) > branch 1 \(serial\) > layer 0 \(Relu\)",
        ),
        ((stax.Dense(1), stax.Relu(), stax.LayerNorm()), X, r"layer 2 \(LayerNorm\).*RMSNorm"),
        ((stax.Conv(1, (2,)),), X, r"layer 0 \(Conv\).*3 axes"),
    ],
)
def test_errors_name_the_layer_by_its_place(layers, x, text):
    with pytest.raises((ValueError, NotImplementedError), match="(?s)" + text):
        stax.serial(*layers)[2](x)


def test_layouts_that_a_layer_forbids_are_refused():
    with pytest.raises(ValueError, match="Asked to compute"):
        NETWORKS["pooling"][2](X, diagonal_spatial=True)
    resize = stax.ImageResize((2, -1, -1, -1), "linear")[2]
    with pytest.raises(ValueError, match="Asked to compute"):
        resize(X, diagonal_batch=True)


def test_dependent_branches_are_noticed():
    twice = stax.serial(
        stax.Dense(1), stax.FanOut(2), stax.parallel(stax.Identity(), stax.Identity())
    )
    with pytest.warns(UserWarning, match="not independent"):
        stax.serial(twice, stax.FanInSum())[2](X)


def test_dropout_sees_equal_inputs_under_jit(rtol):
    kernel_fn = stax.serial(stax.Dense(1), stax.Relu(), stax.Dropout(0.5), stax.Dense(1))[2]
    x = X[:, 0, 0]
    same, other = x + 0, x + 1
    traced = jax.jit(lambda a, b: kernel_fn(a, b, "nngp"))
    close(traced(x, same), kernel_fn(x, None, "nngp"), max(rtol, 1e-8))
    assert float(jnp.diag(traced(x, same))[0]) > float(jnp.diag(kernel_fn(x, x + 1e-6, "nngp"))[0])
    close(traced(x, other), kernel_fn(x, other, "nngp"), max(rtol, 1e-8))


def test_masks_leave_what_is_not_masked_alone(rtol):
    """A masked image is a smaller image, for layers that look at one position at a time."""
    kernel_fn = stax.serial(
        stax.Dense(1, 1.2, 0.3), stax.Relu(), stax.GlobalAvgPool(), stax.Dense(1)
    )[2]
    x = X[:, 0]
    padded = jnp.concatenate([x, jnp.full((4, 2, 2), 7.0)], axis=1)
    for a, b in zip(
        kernel_fn(padded, None, ("nngp", "ntk", "cov1"), mask_constant=7.0),
        kernel_fn(x, None, ("nngp", "ntk", "cov1")),
        strict=True,
    ):
        close(a, b, rtol)


def test_embedding_is_a_dense_layer_on_one_hot_vectors(rtol):
    tokens = jnp.array([[0, 2, 1], [2, 2, 0]])
    rest = stax.serial(stax.Relu(), stax.Conv(1, (2,)), stax.GlobalAvgPool())
    embedded = stax.serial(stax.Embedding(3, 1, 1.3), rest)[2](tokens)
    # <one-hot, one-hot> / 3 in the dense layer, so its weights are sqrt(3) times as wide.
    dense = stax.serial(stax.Dense(1, 1.3 * 3**0.5), rest)[2](jnp.eye(3)[tokens])
    for field in ("nngp", "ntk", "cov1"):
        close(getattr(embedded, field), getattr(dense, field), rtol)


def test_patterns_with_x2_none_and_without_a_pattern(rtol):
    kernel_fn = stax.serial(stax.Dense(1), stax.Aggregate(), stax.Relu(), stax.GlobalAvgPool())[2]
    x = X[:, 0]
    A = (jax.random.uniform(KEY, (4, 4, 4)) > 0.5).astype(x.dtype)
    close(
        kernel_fn(x, None, "ntk", pattern=(A, A)), kernel_fn(x, x + 0, "ntk", pattern=(A, A)), rtol
    )
    eye = jnp.broadcast_to(jnp.eye(4), (4, 4, 4))
    close(kernel_fn(x, None, "ntk"), kernel_fn(x, None, "ntk", pattern=(eye, eye)), rtol)
    with pytest.raises(NotImplementedError, match="give both or none"):
        kernel_fn(x, x + 1, pattern=(A, None))


@stax.layer
@stax.supports_masking(remask_kernel=True)
def Double():
    def init_fn(rng, input_shape):
        return input_shape, ()

    def apply_fn(params, inputs, mask=None, **kwargs):
        return 2 * inputs

    @stax.requires(diagonal_spatial=stax.Diagonal())
    def kernel_fn(k, **kwargs):
        return k.replace(
            nngp=4 * k.nngp,
            ntk=k.ntk if k.ntk is None else 4 * k.ntk,
            cov1=4 * k.cov1,
            cov2=None if k.cov2 is None else 4 * k.cov2,
        )

    return init_fn, apply_fn, kernel_fn


def test_layers_of_a_users_own_cut_the_graph(rtol):
    ours = stax.serial(stax.Conv(1, (2, 2), b_std=0.1), Double(), stax.Relu(), stax.Flatten())
    theirs = stax.serial(
        stax.Conv(1, (2, 2), b_std=0.1), stax.DotGeneral(rhs=2.0), stax.Relu(), stax.Flatten()
    )
    leaves_close(ours[2](X, Y), theirs[2](X, Y), rtol)
    _, params = ours[0](KEY, X.shape)
    close(ours[1](params, X), theirs[1](params, X), rtol)
    masked = ours[2](X.at[0, 0].set(9.0), None, "nngp", mask_constant=9.0)
    close(masked, theirs[2](X.at[0, 0].set(9.0), None, "nngp", mask_constant=9.0), rtol)
    assert "Double" in ours[2].explain(X) or "kernel_fn" in ours[2].explain(X)


def test_bool_and_diagonal_algebra():
    B, D = stax.Bool, stax.Diagonal
    assert (B.YES & B.MAYBE) is B.MAYBE
    passes, ends, forbids = D(), D(B.YES, B.YES), D(B.NO, B.YES)
    assert bool(passes >> ends) and not bool(passes >> forbids) and not bool(passes)
    assert bool(ends << passes) and not bool(ends & forbids)
    for a, b, c in itertools.product((passes, ends, forbids), repeat=3):
        assert bool((a >> b) >> c) == bool(a >> (b >> c))
