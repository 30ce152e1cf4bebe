"""Structured derivatives, as AUTO plans them, against the peer's best of its three methods.

The peer's best is its structured derivatives on the MLP and Jacobian contraction on the CNN and on
the transformer: each row names the method that it runs there.
"""

from __future__ import annotations

from benchmarks.protocol import Case, Side, Target, Workload
from benchmarks.workloads.finite_methods import network

BEST = {"mlp": 3, "cnn": 1, "transformer": 1}
"""The peer's fastest method for each network."""


def ntk(name: str, trace: bool):
    def build(side: Side) -> Case:
        import jax

        f, params, inputs, batch = network(name, side)
        x = inputs(batch, 0)
        ntk_fn = jax.jit(
            side.nt.empirical_ntk_fn(
                f,
                trace_axes=(-1,) if trace else (),
                vmap_axes=0,
                implementation=0 if side.ours else BEST[name],
            )
        )
        forward = jax.jit(f)
        return Case(run=lambda: ntk_fn(x, None, params), forward=lambda: forward(params, x))

    form = "trace" if trace else "outputs"
    target = Target("speedup", 1.2 if name == "mlp" and trace else 2.0)
    return Workload(f"ntk/structured/{name}/{form}", build, targets=(target,))


WORKLOADS = [ntk(name, trace) for name in BEST for trace in (True, False)]
