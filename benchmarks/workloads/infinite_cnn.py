"""Kernels of infinitely wide convolutional networks, float32, jitted on both sides.

Inputs are standard normal images 32×32×3; `x2=None` unless the name says otherwise. Sizes are small
because the peer takes seconds for each pair of images.
"""

from __future__ import annotations

from benchmarks.networks import Draw
from benchmarks.protocol import Case, Side, Target, Workload


def flat_network(stax, depth: int = 5):
    """`depth` convolutions and a dense layer, without pooling."""
    conv = [stax.Conv(1, (3, 3), padding="SAME", W_std=1.4, b_std=0.1), stax.Relu()]
    return stax.serial(*(conv * depth), stax.Flatten(), stax.Dense(1))


def myrtle(stax, depth: int):
    """The networks of Shankar et al. 2020 ("Neural kernels without tangents"), fig. 2."""
    conv = [stax.Conv(1, (3, 3), padding="SAME", W_std=2**0.5), stax.Relu()]
    pool = [stax.AvgPool((2, 2), strides=(2, 2))]
    first, second, third = {5: (1, 1, 1), 7: (1, 2, 2), 10: (2, 3, 3)}[depth]
    layers = conv * first + pool + conv * second + pool + conv * third + pool * 3
    return stax.serial(*layers, stax.Flatten(), stax.Dense(1))


def wide_resnet(stax, blocks: int):
    """Wide residual network (Zagoruyko & Komodakis 2016): three groups, two of them with stride."""

    def conv(strides=(1, 1)):
        return stax.Conv(1, (3, 3), strides=strides, padding="SAME")

    def block(strides, mismatch):
        main = stax.serial(stax.Relu(), conv(strides), stax.Relu(), conv())
        shortcut = stax.Identity() if not mismatch else conv(strides)
        return stax.serial(stax.FanOut(2), stax.parallel(main, shortcut), stax.FanInSum())

    def group(strides):
        return [block(strides if i == 0 else (1, 1), i == 0) for i in range(blocks)]

    layers = [conv(), *group((1, 1)), *group((2, 2)), *group((2, 2))]
    return stax.serial(*layers, stax.AvgPool((8, 8)), stax.Flatten(), stax.Dense(1))


def attention(stax):
    """Two blocks of attention with nonlinearities, pooled over positions."""

    def block():
        return [
            stax.GlobalSelfAttention(1, 1, 1, 1, linear_scaling=True),
            stax.Relu(),
            stax.Dense(1),
        ]

    return stax.serial(stax.Dense(1), *block(), *block(), stax.GlobalAvgPool(), stax.Dense(1))


def compiled(call, *args) -> tuple:
    """No result, once `call` is compiled."""
    call.lower(*args).compile()
    return ()


def images(name, make, n, targets, rectangular=False, shape=(32, 32, 3), small=(8, 8, 3), **kw):
    def build(side: Side) -> Case:
        import jax

        draw, sizes = Draw(6), side.size((n, *shape), (2, *small))
        x1 = draw(*sizes)
        x2 = draw(*sizes) if rectangular else None
        kernel_fn = make(side)[2]
        call = jax.jit(lambda a, b: tuple(kernel_fn(a, b, ("nngp", "ntk"))))
        return Case(run=lambda: call(x1, x2), compile=lambda: compiled(call, x1, x2))

    form = "x1x2" if rectangular else "sym"
    return Workload(f"infinite/cnn/{name}/{form}", build, targets=targets, **kw)


WORKLOADS = [
    images(
        "conv5-flat",
        lambda side: flat_network(side.stax),
        64,
        (Target("speedup", 6), Target("memory_ratio", 10)),
    ),
    images(
        "myrtle-5",
        lambda side: myrtle(side.stax, 5),
        4,
        (Target("speedup", 20), Target("memory_ratio", 7)),
        small=(32, 32, 1),
    ),
    images(
        "myrtle-5",
        lambda side: myrtle(side.stax, 5),
        4,
        (Target("speedup", 10),),
        rectangular=True,
        small=(32, 32, 1),
    ),
    images(
        "myrtle-10",
        lambda side: myrtle(side.stax, 10),
        4,
        (Target("speedup", 30), Target("memory_ratio", 10), Target("compile_ratio", 1)),
        small=(32, 32, 1),
    ),
    images(
        "wide-resnet",
        lambda side: wide_resnet(side.stax, side.size(4, 1)),
        2,
        (Target("speedup", 5), Target("memory_ratio", 1), Target("compile_ratio", 4)),
        small=(32, 32, 1),
    ),
    images(
        "attention",
        lambda side: attention(side.stax),
        16,
        (Target("speedup", 2),),
        shape=(32, 16),
        small=(4, 3),
    ),
]
