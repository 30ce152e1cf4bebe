"""The two first methods of `empirical_ntk_fn`, all outputs and traced over them."""

from __future__ import annotations

from benchmarks.protocol import Case, Side, Workload

METHODS = {"jacobian_contraction": 1, "ntk_vector_products": 2}


def network(name: str, side: Side):
    """(f, params, inputs, batch) of the network, small in a quick run."""
    from benchmarks import networks

    if name == "mlp":
        sizes = (side.size(512, 8), 3, side.size(784, 5), side.size(10, 3))
        return *networks.mlp(*sizes), side.size(64, 3)
    if name == "cnn":
        sizes = (side.size(32, 4), side.size(32, 8), 3, side.size(10, 2))
        return *networks.cnn(*sizes), side.size(16, 2)
    assert name == "transformer"
    sizes = (side.size(128, 8), side.size(2, 1), side.size(64, 4), side.size(4, 2))
    return *networks.transformer(*sizes), side.size(8, 2)


def ntk(name: str, method: str, trace: bool, symmetric: bool = False):
    def build(side: Side) -> Case:
        import jax

        f, params, inputs, batch = network(name, side)
        x1, x2 = inputs(batch, 0), (None if symmetric else inputs(batch, 1))
        ntk_fn = jax.jit(
            side.nt.empirical_ntk_fn(
                f,
                trace_axes=(-1,) if trace else (),
                vmap_axes=0,
                implementation=METHODS[method],
            )
        )
        forward = jax.jit(lambda p, a, b: (f(p, a), None if b is None else f(p, b)))
        return Case(
            run=lambda: ntk_fn(x1, x2, params),
            forward=lambda: forward(params, x1, x2),
        )

    form = ("trace" if trace else "outputs") + ("_x2=None" if symmetric else "")
    return Workload(f"ntk/{method}/{name}/{form}", build)


WORKLOADS = [
    ntk(name, method, trace)
    for method in METHODS
    for name in ("mlp", "cnn")
    for trace in (True, False)
] + [ntk(name, "jacobian_contraction", True, symmetric=True) for name in ("mlp", "cnn")]
