"""Kernels of infinitely wide fully connected networks, float32, jitted on both sides.

Inputs are standard normal, `x2=None` unless the name says otherwise.
"""

from __future__ import annotations

from benchmarks.networks import Draw
from benchmarks.protocol import Case, Side, Target, Workload


def dense_network(stax, nonlinearity: str, depth: int):
    """`depth` hidden dense layers with a nonlinearity each, and one more dense layer."""
    phi = getattr(stax, nonlinearity)
    hidden = [layer for _ in range(depth) for layer in (stax.Dense(1, 1.4, 0.1), phi())]
    return stax.serial(*hidden, stax.Dense(1, 1.0, 0.0))


def fcn(
    nonlinearity, depth, targets, rectangular=False, n=2500, d=784, tag="", memory=True, rtol=1e-4
):
    def build(side: Side) -> Case:
        import jax

        draw, count, width = Draw(5), side.size(n, 24), side.size(d, 16)
        x1 = draw(count, width)
        x2 = draw(count, width) if rectangular else None
        kernel_fn = dense_network(side.stax, nonlinearity, side.size(depth, min(depth, 3)))[2]
        call = jax.jit(lambda a, b: tuple(kernel_fn(a, b, ("nngp", "ntk"))))
        return Case(run=lambda: call(x1, x2))

    shape = "x1x2" if rectangular else "sym"
    name = f"infinite/fcn/{nonlinearity.lower()}-{depth}/{shape}{tag}"
    return Workload(name, build, targets=targets, memory=memory, rtol=rtol)


WORKLOADS = [
    fcn("Relu", 5, (Target("speedup", 3.5), Target("memory_ratio", 2.5))),
    fcn("Relu", 10, (Target("speedup", 6), Target("memory_ratio", 4))),
    fcn("Erf", 5, (Target("speedup", 3),)),
    fcn("Gelu", 5, (Target("speedup", 3),)),
    fcn("Relu", 5, (Target("speedup", 2.5),), rectangular=True),
    # Compile time against depth; a call of so few examples is all overhead.
    # The peer's float32 differs by 1e-3 from float64 at this depth, this package's by 2e-6.
    fcn(
        "Relu",
        64,
        (Target("compile_ratio", 4),),
        n=64,
        d=32,
        tag="/compile",
        memory=False,
        rtol=2e-3,
    ),
]
