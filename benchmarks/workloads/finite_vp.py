"""NTK-vector products, as multiples of the two forward passes.

The floor is 3 fresh and 2 repeated. With F a forward pass on x1 or x2: values F each (which the
operator keeps between products), the transposed pass on x2 2 F, the tangent pass on x1 2 F.
"""

from __future__ import annotations

from benchmarks.protocol import Case, Side, Target, Workload
from benchmarks.workloads.finite_methods import network

FRESH = (Target("over_forward", 3.5), Target("peak_over_baseline", 1.2))
REPEATED = (Target("over_forward", 2.5),)


def vp(name: str, repeated: bool):
    def build(side: Side) -> Case:
        import jax

        f, params, inputs, batch = network(name, side)
        x1, x2 = inputs(batch, 0), inputs(batch, 1)
        # A cotangent of the shape of f(params, x2) that is no constant.
        v = jax.jit(f)(params, inputs(batch, 2))
        if repeated and hasattr(side.nt, "ntk_operator"):
            op = side.nt.ntk_operator(f, params, x1, x2)
            run = lambda: op @ v
        else:
            # The peer keeps nothing between products: its repeated product is a fresh one.
            product = jax.jit(lambda p, a, b, v: side.nt.empirical_ntk_vp_fn(f, a, b, p)(v))
            run = lambda: product(params, x1, x2, v)
        forward = jax.jit(lambda p, a, b: (f(p, a), f(p, b)))
        pull = jax.jit(lambda p, b, v: jax.vjp(lambda p: f(p, b), p)[1](v))
        return Case(
            run=run,
            forward=lambda: forward(params, x1, x2),
            memory_baseline=lambda: pull(params, x2, v),
        )

    form = "repeated" if repeated else "fresh"
    return Workload(f"vp/{form}/{name}", build, targets=REPEATED if repeated else FRESH)


WORKLOADS = [
    vp(name, repeated) for name in ("mlp", "cnn", "transformer") for repeated in (False, True)
]
