"""Small networks in plain JAX: each a way of using weights that structured derivatives must see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from finite.table import Network, normal

NHWC = ("NHWC", "HWIO", "NHWC")


def softmax_attention(q, k, v):
    """q, k, v: (.., heads, time, channels)."""
    scores = jnp.einsum("...hqc,...hkc->...hqk", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("...hqk,...hkc->...hqc", jax.nn.softmax(scores, axis=-1), v)


def layer_norm(x, scale, shift):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + shift


def rms_norm(x, scale):
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def rotary(x):
    """Rotates pairs of channels by an angle that grows with time; x: (.., time, channels)."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[-2], dtype=x.dtype)[:, None] / 10.0 ** jnp.arange(
        half, dtype=x.dtype
    )
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def transformer(p, tokens):
    """Tied embedding, class token, positions, rotary grouped-query attention, gated layer."""
    h = p["embedding"][tokens] * 2.0 + p["positions"]
    token = jnp.broadcast_to(p["class"], (h.shape[0], 1, h.shape[-1]))
    h = jnp.concatenate([token, h], axis=1)
    n = rms_norm(h, p["scale"])
    split = lambda x, heads: jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)
    q, k, v = split(n @ p["q"], 4), split(n @ p["k"], 2), split(n @ p["v"], 2)
    k, v = jnp.repeat(k, 2, axis=1), jnp.repeat(v, 2, axis=1)
    mixed = softmax_attention(rotary(q), rotary(k), v)
    h = h + jnp.einsum("nhtc,hcd->ntd", mixed, p["out"])
    n = layer_norm(h, p["scale"], p["shift"])
    h = h + (jax.nn.silu(n @ p["gate"]) * (n @ p["up"])) @ p["down"]
    return jnp.mean(h, axis=1) @ p["embedding"].T


def transformer_params():
    shapes = {
        "embedding": (7, 8), "positions": (3, 8), "class": (8,), "scale": (8,), "shift": (8,),
        "q": (8, 8), "k": (8, 4), "v": (8, 4), "out": (4, 2, 8), "gate": (8, 5), "up": (8, 5),
        "down": (5, 8),
    }  # fmt: skip
    return {name: normal(k, *shape) / 2 for k, (name, shape) in enumerate(shapes.items())}


def lstm(p, x):
    """Embedding, then an LSTM as a scan; the readout sees every step."""
    x = p["embedding"][x]

    def step(carry, x_t):
        h, c = carry
        i, f, g, o = jnp.split(x_t @ p["w"] + h @ p["u"] + p["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros((x.shape[0], p["u"].shape[0]), x.dtype)
    _, hs = lax.scan(step, (start, start), jnp.swapaxes(x, 0, 1), reverse=True)
    return jnp.mean(hs, 0) @ p["out"]


def gru(p, x):
    """A GRU whose first state is trained."""

    def step(h, x_t):
        zr = jax.nn.sigmoid(jnp.concatenate([x_t, h], -1) @ p["gates"])
        z, r = jnp.split(zr, 2, axis=-1)
        new = jnp.tanh(jnp.concatenate([x_t, r * h], -1) @ p["w"])
        return (1 - z) * h + z * new, None

    start = jnp.broadcast_to(p["start"], (x.shape[0], p["start"].shape[0]))
    return lax.scan(step, start, jnp.swapaxes(x, 0, 1))[0]


def stacked(p, x):
    """Layers stacked on an axis and scanned over, rematerialised; a shared scale in each."""

    @jax.checkpoint
    def layer(h, w):
        return h + jnp.tanh(h @ w["w"] + w["b"]) * p["scale"], None

    return lax.scan(layer, x, p["layers"])[0] @ p["layers"]["w"][1]


def nested(p, x):
    """A loop in a loop: stacked layers over time steps."""

    def step(h, x_t):
        inner = lambda g, w: (jnp.tanh(g @ w + x_t), None)
        h = lax.scan(inner, h, p["w"])[0]
        return h @ p["u"], jnp.sum(h, -1)

    h, sums = lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))
    return h + jnp.mean(sums, 0)[:, None] * p["u"][:1] / 2


def branching(p, x):
    """The branch depends on the data; both use one weight."""

    def one(h):
        return lax.cond(
            jnp.sum(h) > 0,
            lambda h: jnp.tanh(h @ p["w"]),
            lambda h: h @ p["w"] @ p["w"] * p["s"],
            h,
        )

    return jax.vmap(one)(x)


def prologue(p, x):
    """Weights that are computed before they are used: norms, masks, low rank, powers, joins."""
    w = p["v"] / jnp.sqrt(jnp.sum(p["v"] ** 2, 0)) * p["g"]
    low_rank = p["frozen"] + 0.5 * p["b"] @ p["a"]
    mask = jnp.asarray([[1, 0, 1], [0, 1, 1], [1, 1, 0]], x.dtype)
    h = jnp.tanh(x @ w + lax.stop_gradient(p["g"]))
    h = jnp.tanh(h @ low_rank) * jnp.exp(p["log_scale"])
    h = h @ (p["masked"] * mask) + h @ p["masked"]
    return h @ jnp.concatenate([p["v"], -p["v"].T / 3], axis=1)


def prologue_params():
    shapes = {
        "v": (3, 3), "g": (3,), "frozen": (3, 3), "b": (3, 1), "a": (1, 3), "log_scale": (3,),
        "masked": (3, 3),
    }  # fmt: skip
    return {name: normal(k, *shape) / 2 for k, (name, shape) in enumerate(shapes.items())}


def views(p, x):
    """Slices, transposes, reversals, casts and scalings of one weight."""
    w = p["w"] * (1 / jnp.sqrt(4.0)).astype(x.dtype)
    h = jnp.tanh(x @ w[:3, :3])
    h = jnp.tanh(h @ w[1:, 1:].T + w[0, ::-1][:3])
    h = h @ w.reshape(2, 2, 4)[0, 1, :3, None] * w[3, 3]
    return jnp.concatenate([h, x @ -p["w"][1:, :1], x + p["w"][1, 1:] / 3], axis=-1)


def experts(p, x):
    """Mixture of experts: each example goes through the weights that its first entry chooses."""
    chosen = jnp.clip(jnp.floor(x[:, 0] * 2).astype(jnp.int32) + 1, 0, 2)
    h = jnp.einsum("ni,nij->nj", x, p["w"][chosen])
    return jax.nn.relu(h + jnp.take(p["b"], chosen, axis=1, mode="clip").T)


def convolutions(p, x):
    """Depthwise, grouped, dilated, transposed and one-by-one convolutions, batch and group norm."""
    conv = lambda x, k, strides=(1, 1), **kw: lax.conv_general_dilated(
        x, k, strides, kw.pop("padding", "SAME"), dimension_numbers=NHWC, **kw
    )
    x = jax.nn.relu(conv(x, p["k"]) + p["bias"])
    x = conv(x, p["depthwise"], feature_group_count=4)
    x = (x - p["mean"]) * lax.rsqrt(jax.nn.softplus(p["var"])) * p["scale"]  # evaluation mode
    x = jax.nn.gelu(conv(x, p["grouped"], (2, 1), feature_group_count=2, rhs_dilation=(1, 2)))
    groups = x.reshape(*x.shape[:3], 2, 2)
    groups = (groups - groups.mean((1, 2, 4), keepdims=True)) * p["shared"]
    x = groups.reshape(x.shape)
    x = jnp.tanh(lax.conv_transpose(x, p["transposed"], (2, 2), "VALID", dimension_numbers=NHWC))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return (x @ p["pointwise"] + conv(x, p["pointwise"][None, None])).mean((1, 2))


def convolution_params():
    shapes = {
        "k": (3, 2, 2, 4), "bias": (4,), "depthwise": (2, 2, 1, 4), "mean": (4,), "var": (4,),
        "scale": (4,), "grouped": (2, 2, 2, 4), "shared": (), "transposed": (2, 3, 4, 3),
        "pointwise": (3, 2),
    }  # fmt: skip
    return {name: normal(k, *shape) / 2 for k, (name, shape) in enumerate(shapes.items())}


@jax.custom_vjp
def doubled(w, x):
    """A product whose reverse mode says twice the derivative: a rule of the user's own counts."""
    return x @ w


doubled.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (2 * r[1].T @ g, g @ r[0].T))


@jax.custom_jvp
def tripled(w, x):
    return x * w


tripled.defjvps(lambda dw, y, w, x: 3 * dw * x, lambda dx, y, w, x: dx * w)


def opaque(p, x):
    """Steps without rules: sorting, cumulative products, solves, custom derivatives."""
    h = doubled(p["w"] / 2, x) + doubled(p["w"].T * jnp.asarray(3.0, x.dtype), x)
    h = jnp.tanh(tripled(p["s"], h)) * jnp.sort(p["w"], axis=0)[0]
    h = h + lax.dynamic_slice(p["table"], (jnp.int32(x[0, 0] > 0), jnp.int32(0)), (1, 3))
    h = h / (1 + p["s"] ** 2) + jnp.where(x > 0, p["s"], h) + jnp.maximum(h, p["s"])
    h = h - p["w"].at[:1].add(x[:1] * 0.1)[0] + jnp.cumsum(p["s"] * h, axis=-1)
    return jnp.linalg.solve(p["w"] + 3 * jnp.eye(3, dtype=x.dtype), h.T).T


def outputs_that_are_weights(p, x):
    return p["w"][None] * jnp.ones_like(x) + 0 * x, jnp.broadcast_to(p["w"] ** 2, x.shape)


def fourier(p, x):
    """Complex values between real weights and real outputs."""
    spectrum = jnp.fft.rfft(x, axis=-1) * lax.complex(p["re"], p["im"])
    return jnp.fft.irfft(spectrum, n=x.shape[-1], axis=-1)


def integers(seed, high, *shape):
    return jax.random.randint(jax.random.key(seed), shape, 0, high)


def trees(**shapes):
    return {name: normal(k, *shape) / 2 for k, (name, shape) in enumerate(shapes.items())}


NETWORKS = [
    Network(
        "transformer",
        transformer,
        transformer_params(),
        integers(0, 7, 2, 3),
        integers(1, 7, 3, 3),
    ),
    Network(
        "lstm",
        lstm,
        trees(embedding=(5, 2), w=(2, 12), u=(3, 12), b=(12,), out=(3, 2)),
        integers(0, 5, 2, 4),
        integers(1, 5, 2, 4),
    ),
    Network(
        "gru",
        gru,
        trees(gates=(5, 6), w=(5, 3), start=(3,)),
        normal(0, 2, 3, 2),
        normal(1, 3, 3, 2),
    ),
    Network(
        "stacked",
        stacked,
        {"layers": trees(w=(3, 2, 2), b=(3, 2)), "scale": normal(5, 2)},
        normal(0, 3, 2),
        normal(1, 2, 2),
    ),
    Network("nested", nested, trees(w=(2, 3, 3), u=(3, 3)), normal(0, 2, 2, 3), normal(1, 3, 2, 3)),
    Network("branching", branching, trees(w=(3, 3), s=()), normal(0, 4, 3), normal(1, 3, 3)),
    Network("prologue", prologue, prologue_params(), normal(0, 3, 3), normal(1, 2, 3)),
    Network("views", views, trees(w=(4, 4)), normal(0, 3, 3), normal(1, 2, 3)),
    Network("experts", experts, trees(w=(3, 3, 2), b=(2, 3)), normal(0, 4, 3), normal(1, 3, 3)),
    Network(
        "convolutions",
        convolutions,
        convolution_params(),
        normal(0, 2, 5, 6, 2),
        normal(1, 3, 5, 6, 2),
    ),
    Network(
        "opaque",
        opaque,
        trees(w=(3, 3), s=(3,), table=(2, 3)),
        normal(0, 2, 3),
        normal(1, 3, 3),
        vmap=None,
    ),
    Network("fourier", fourier, trees(re=(3,), im=(3,)), normal(0, 2, 4), normal(1, 3, 4)),
]
