"""The empirical NTK as AUTO computes it, against the peer's best of its three methods.

The peer's best is named for each network by `Row.best`, measured on the same machine by
`python -m benchmarks.methods --package neural_tangents`: structured derivatives (3), but for the
LSTM, on which they fail (JAX 0.4.25 ends the process), and where Jacobian contraction (1) is best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.protocol import Case, Side, Target, Workload


@dataclass(frozen=True)
class Row:
    """One network at one size."""

    name: str
    network: str
    sizes: dict[str, tuple[Any, Any]]
    """Keyword arguments of the network: in full, in a quick run."""
    examples: tuple[int, int]
    best: int | None
    """The peer's fastest method; None where it cannot."""
    trace: bool = True
    outputs: bool = True
    speedup: tuple[float, float] = (2.0, 2.0)
    """Targets with the outputs traced, and with all of them."""
    memory: float | None = None
    """Target of the ratio of peak memory."""
    budget: str | None = None
    compiling: float | None = None
    """Target of the ratio of tracing and compiling."""


def mlp(name: str, width: int, examples: int) -> Row:
    sizes = {"width": (width, 8), "inputs": (784, 5), "outputs": (10, 3)}
    return Row(name, "mlp", sizes, (examples, 3), 3, speedup=(1.2, 2.0))


def transformer(name: str, logits: int, examples: int, **more: Any) -> Row:
    sizes = {"d": (128, 8), "tokens": (64, 4), "heads": (4, 2), "blocks": (2, 1)}
    return Row(name, "transformer", {**sizes, "outputs": (logits, 11)}, (examples, 2), **more)


RESNET18 = {
    "widths": ((64, 128, 256, 512), (4, 4)),
    "blocks": (2, 1),
    "size": (64, 8),
    "stem": (4, 1),
}
LSTM = {"d": (64, 3), "steps": (32, 3), "features": (16, 2)}
ROWS = [
    mlp("mlp", 512, 64),
    mlp("mlp_n128", 512, 128),
    mlp("mlp_w1024", 1024, 64),
    Row("cnn", "cnn", {"width": (32, 4), "size": (32, 8)}, (16, 2), 3, outputs=False),
    Row("resnet", "resnet", {"widths": ((16, 32, 64, 128), (3, 4)), "size": (32, 8)}, (8, 2), 3,
        outputs=False, compiling=1.0),
    transformer("transformer", 100, 4, best=3, outputs=False, memory=10.0),
    transformer("transformer_1000", 1000, 2, best=3, outputs=False, speedup=(10.0, 2.0)),
    Row("lstm", "lstm", LSTM, (32, 2), 1, outputs=False),
    Row("embedding_lstm", "lstm", {**LSTM, "words": (500, 7)}, (32, 2), None, outputs=False),
    Row("resnet18", "resnet", {**RESNET18, "outputs": (1000, 11)}, (2, 2), None, trace=False,
        budget="1800MiB"),
]  # fmt: skip


def make(row: Row, side: Side):
    """(f, params, x) of a row."""
    from benchmarks import deep_networks, networks

    make = getattr(networks, row.network, None) or getattr(deep_networks, row.network)
    f, params, inputs = make(**{name: side.size(*pair) for name, pair in row.sizes.items()})
    return f, params, inputs(side.size(*row.examples))


def ntk(row: Row, trace: bool) -> Workload:
    def build(side: Side) -> Case:
        import jax

        f, params, x = make(row, side)
        own = {"memory": row.budget} if side.ours and row.budget else {}
        ntk_fn = jax.jit(
            side.nt.empirical_ntk_fn(
                f,
                trace_axes=(-1,) if trace else (),
                vmap_axes=0,
                implementation=0 if side.ours else row.best,
                **own,
            )
        )
        forward = jax.jit(f)
        return Case(run=lambda: ntk_fn(x, None, params), forward=lambda: forward(params, x))

    targets = [] if row.best is None else [Target("speedup", row.speedup[0 if trace else 1])]
    if row.memory is not None:
        targets.append(Target("memory_ratio", row.memory))
    if row.compiling is not None:
        targets.append(Target("compile_ratio", row.compiling))
    if row.budget is not None:
        targets.append(Target("peak_mib", 2048))
    form = "trace" if trace else "outputs"
    return Workload(
        f"ntk/structured/{row.name}/{form}",
        build,
        peer=None if row.best is None else "neural-tangents",
        targets=tuple(targets),
    )


WORKLOADS = [
    ntk(row, trace)
    for row in ROWS
    for trace in (True, False)
    if (row.trace if trace else row.outputs)
]
