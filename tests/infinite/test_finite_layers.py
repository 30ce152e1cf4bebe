"""The finite half: shapes and structure of parameters, options, masks, patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tangents import stax

KEY = jax.random.key(0)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


@pytest.mark.parametrize(
    "layer, in_shape, out_shape, params",
    [
        (stax.Dense(4, b_std=0.1), (-1, 3), (-1, 4), ((3, 4), (1, 4))),
        (stax.Dense(4), (2, 5, 3), (2, 5, 4), ((3, 4), None)),
        (
            stax.Dense(4, b_std=1.0, batch_axis=1, channel_axis=0),
            (3, 2),
            (4, 2),
            ((3, 4), (4, 1)),
        ),
        (
            stax.Dense(4, parameterization="standard", s=(2, 3), b_std=1.0),
            (-1, 6),
            (-1, 12),
            ((6, 12), (1, 12)),
        ),
        (
            stax.Conv(4, (2, 3), b_std=1.0),
            (-1, 5, 6, 3),
            (-1, 4, 4, 4),
            ((2, 3, 3, 4), (1, 1, 1, 4)),
        ),
        (
            stax.Conv(4, (2, 3), dimension_numbers=("NCHW", "OIHW", "NWHC"), padding="SAME"),
            (-1, 3, 5, 6),
            (-1, 6, 5, 4),
            ((4, 3, 2, 3), None),
        ),
        (
            stax.Conv(4, (2,), strides=(2,), padding="CIRCULAR"),
            (-1, 5, 3),
            (-1, 3, 4),
            ((2, 3, 4), None),
        ),
        (
            stax.ConvTranspose(4, (3,), strides=(2,), padding="CIRCULAR"),
            (-1, 5, 3),
            (-1, 10, 4),
            ((3, 3, 4), None),
        ),
        (
            stax.ConvLocal(4, (2,), b_std=1.0),
            (-1, 5, 3),
            (-1, 4, 4),
            ((4, 6, 4), (1, 4, 4)),
        ),
        (stax.Embedding(7, 4), (-1, 5), (-1, 5, 4), (7, 4)),
        (stax.Flatten(), (-1, 5, 3), (-1, 15), ()),
        (stax.Flatten(batch_axis_out=1), (2, 5, 3), (15, 2), ()),
        (stax.GlobalAvgPool(), (-1, 5, 6, 3), (-1, 3), ()),
        (stax.AvgPool((2, 2), (2, 2)), (-1, 5, 6, 3), (-1, 2, 3, 3), ()),
        (stax.FanOut(2), (-1, 3), [(-1, 3), (-1, 3)], ()),
        (stax.FanInConcat(), [(-1, 3), (-1, 4)], (-1, 7), ()),
        (stax.FanInSum(), [(-1, 3), (-1, 3)], (-1, 3), ()),
        (stax.ImageResize((-1, 4, -1), "linear"), (-1, 5, 3), (-1, 4, 3), ()),
        (stax.Index(stax.Slice[:, 1, ::2]), (-1, 5, 6, 3), (-1, 3, 3), ()),
        (stax.LayerNorm(), (-1, 3), (-1, 3), ()),
        (stax.RMSNorm(), (-1, 3), (-1, 3), ()),
    ],
)
def test_output_shape_and_parameters(layer, in_shape, out_shape, params):
    init_fn, apply_fn, _ = layer
    got_shape, got = init_fn(KEY, in_shape)
    assert got_shape == out_shape
    assert shapes(got) == params

    def known(shape):
        return [known(s) for s in shape] if isinstance(shape, list) else tuple(map(abs, shape))

    def ones(shape):
        return [ones(s) for s in shape] if isinstance(shape, list) else jnp.ones(shape)

    x = ones(known(in_shape))
    if params == (7, 4):
        x = x.astype(int)
    assert shapes(apply_fn(got, x)) == known(out_shape)


def test_attention_parameters():
    layer = stax.GlobalSelfAttention(
        6, 5, 4, 3, linear_scaling=False, b_std=1.0, pos_emb_type="CONCAT", n_chan_pos_emb=2
    )
    shape, params = layer[0](KEY, (-1, 7, 8))
    assert shape == (-1, 7, 6)
    assert shapes(params) == ((3, 10, 5), (3, 10, 5), (3, 8, 4), (12, 6), (1, 1, 6), (1, 7, 2))
    assert layer[1](params, jnp.ones((2, 7, 8))).shape == (2, 7, 6)
    tied = stax.GlobalSelfAttention(6, 5, 4, 3)[0](KEY, (-1, 7, 8))[1]
    assert tied[0] is None and tied[4] is None and tied[5] is None


def test_layers_unpack_index_and_compose_with_plain_triples():
    dense = stax.Dense(4)
    assert dense[2] is tuple(dense)[2] and len(dense) == 3
    init_fn, apply_fn, kernel_fn = stax.serial(tuple(dense), stax.Relu())
    shape, params = init_fn(KEY, (-1, 3))
    assert shape == (-1, 4) and len(params) == 2
    jitted = stax.serial((dense[0], jax.jit(dense[1]), dense[2]), stax.Relu())
    x = jnp.ones((2, 3))
    np.testing.assert_allclose(jitted[1](params, x), apply_fn(params, x))
    np.testing.assert_array_equal(jitted[2](x).nngp, kernel_fn(x).nngp)
    with pytest.raises(TypeError, match="a layer is a triple"):
        stax.serial(stax.Relu)


def test_serial_of_nothing_is_the_identity():
    init_fn, apply_fn, kernel_fn = stax.serial()
    assert init_fn(KEY, (-1, 3)) == ((-1, 3), [])
    x = jnp.eye(3)
    np.testing.assert_array_equal(apply_fn([], x), x)
    np.testing.assert_allclose(kernel_fn(x, None, "nngp"), jnp.eye(3) / 3)


def test_repeat_is_the_layer_repeated(rtol):
    block = stax.serial(stax.Dense(3, 1.1, 0.1), stax.Erf())
    init_fn, apply_fn, _ = stax.repeat(block, 3)
    _, params = init_fn(KEY, (2, 3))
    x = y = jnp.arange(6.0).reshape(2, 3) / 5
    for i in range(3):
        y = block[1](jax.tree.map(lambda p, i=i: p[i], params), y)
    np.testing.assert_allclose(apply_fn(params, x), y, rtol=rtol)
    with pytest.raises(ValueError, match="shape"):
        stax.repeat(stax.Dense(4), 2)[0](KEY, (2, 3))


def test_masked_entries_do_not_matter(x64):
    layers = [
        stax.Conv(4, (3,), padding="SAME", b_std=0.1),
        stax.Relu(),
        stax.GlobalSelfAttention(4, 3, 3, 2),
        stax.LayerNorm(axis=(1, 2)),
        stax.AvgPool((2,)),
        stax.GlobalAvgPool(),
    ]
    init_fn, apply_fn, _ = stax.serial(*layers)
    x = jax.random.normal(KEY, (2, 6, 3))
    x = x.at[0, 4:].set(jnp.nan)
    _, params = init_fn(jax.random.key(1), x.shape)
    y = stax.unmask_fn(apply_fn)(params, x, mask_constant=np.nan)
    assert bool(jnp.isfinite(y).all())
    masked = apply_fn(params, stax.MaskedArray(x.at[0, 4:].set(7.0), jnp.isnan(x)))
    np.testing.assert_allclose(masked.masked_value, y, rtol=1e-6)


def test_masked_averages_count_what_is_there():
    x = jnp.array([[1.0, 2.0, 9.0, 5.0]]).reshape(1, 4, 1)
    pooled = stax.AvgPool((2,), (2,))[1]((), x, mask_constant=9.0)
    np.testing.assert_allclose(pooled.masked_value.ravel(), [1.5, 5.0])
    mean = stax.GlobalAvgPool()[1]((), x, mask_constant=9.0)
    np.testing.assert_allclose(mean.masked_value.ravel(), [8 / 3], rtol=1e-6)


def test_sparse_and_dense_patterns_agree():
    edges = jnp.array([[[0, 1], [2, 1], [2, 1], [-1, -1]]])
    A = jnp.zeros((1, 3, 3)).at[0, 0, 1].add(1).at[0, 2, 1].add(2)
    x = jax.random.normal(KEY, (1, 3, 2))
    dense = stax.Aggregate()[1]((), x, pattern=A)
    with pytest.warns(UserWarning, match="SPARSE"):
        layer = stax.Aggregate(implementation="SPARSE")
    np.testing.assert_allclose(layer[1]((), x, pattern=edges), dense, rtol=1e-6)
    np.testing.assert_array_equal(stax.Aggregate()[1]((), x), x)


def test_dropout_keeps_at_the_rate_and_needs_a_key():
    _, apply_fn, _ = stax.Dropout(0.8)
    y = apply_fn((), jnp.ones((100, 100)), rng=KEY)
    assert abs(float((y > 0).mean()) - 0.8) < 0.02
    with pytest.raises(ValueError, match="rng"):
        stax.serial(stax.Dropout(0.8))[1]([()], jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="keep"):
        stax.Dropout(0.0)


def test_a_window_larger_than_the_input_is_told():
    layers = stax.Conv(2, (3, 3)), stax.AvgPool((5, 1)), stax.ConvLocal(2, (1, 6))
    for layer in layers:
        network = stax.serial(stax.Conv(2, (2, 2)), layer, stax.Flatten(), stax.Dense(1))
        x = jnp.ones((2, 3, 3, 1))
        with pytest.raises(ValueError, match=r"layer 1 .*does not fit into \(2, 2\) positions"):
            network[0](jax.random.key(0), x.shape)
        with pytest.raises(ValueError, match=r"layer 1 .*does not fit into \(2, 2\) positions"):
            network[2](x)


def test_enums_take_upper_case_names_and_members():
    assert stax.Padding("SAME") is stax.Padding.SAME
    with pytest.raises(ValueError, match="'same' is not a valid Padding"):
        stax.Conv(1, (2,), padding="same")
    stax.Conv(1, (2,), padding=stax.Padding.SAME)
    x = jnp.array([-1.0, 2.0])
    assert stax.AttentionMechanism.ABS.fn()(x).tolist() == [1.0, 2.0]


def test_program_of_the_contract_runs():
    import tangents as nt

    k1, k2, k3, k4 = jax.random.split(jax.random.PRNGKey(1), 4)
    x1 = jax.random.normal(k1, (4, 12, 12, 3))
    x2 = jax.random.normal(k2, (3, 12, 12, 3))
    init_fn, f, _ = stax.serial(
        stax.Conv(4, (3, 3)),
        stax.Relu(),
        stax.Conv(4, (3, 3)),
        stax.Relu(),
        stax.Conv(4, (3, 3)),
        stax.Flatten(),
        stax.Dense(10),
    )
    _, params = init_fn(k3, x1.shape)
    ntk_vp_fn = nt.empirical_ntk_vp_fn(f, x1, x2, params)
    cotangents = jax.random.normal(k4, f(params, x2).shape)
    assert ntk_vp_fn(cotangents).shape == f(params, x1).shape
