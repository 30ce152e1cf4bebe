"""Kernels of a fully connected network with a nonlinearity that has no closed form, float32.

`× forward` compares with this package's own kernel of the same network with Relu (the row's
"forward pass"); the peer integrates with ElementwiseNumerical, 20 x 20 nodes. Kinks cost the peer
its accuracy, so those rows run without it.
"""

from __future__ import annotations

from benchmarks.networks import Draw
from benchmarks.protocol import Case, Side, Target, Workload

_DEPTH = 2


def _function(name: str):
    import jax
    import jax.numpy as jnp

    functions = {"tanh": jnp.tanh, "arctan": jnp.arctan, "relu6": jax.nn.relu6}
    functions["clip"] = lambda x: jnp.clip(x, -0.5, 2)
    functions["hard_swish"] = jax.nn.hard_swish
    return functions[name]


def _layer(stax, ours: bool, name: str):
    import warnings

    if ours:
        named = {"tanh": "Tanh", "mish": "Mish", "hardtanh": "HardTanh", "selu": "Selu"}
        named |= {"elu": "Elu", "silu": "SiLU", "softplus": "Softplus"}
        return getattr(stax, named[name])() if name in named else stax.Elementwise(_function(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stax.ElementwiseNumerical(_function(name), 20)


def any_function(name: str, peer: str | None, n: int) -> Workload:
    def build(side: Side) -> Case:
        import jax

        x = Draw(5)(side.size(n, 12), side.size(256, 8))

        def call(make):
            stax = side.stax
            layers = [u for _ in range(_DEPTH) for u in (stax.Dense(1, 1.4, 0.1), make())]
            kernel_fn = stax.serial(*layers, stax.Dense(1))[2]
            return jax.jit(lambda a: tuple(kernel_fn(a, None, ("nngp", "ntk"))))

        run = call(lambda: _layer(side.stax, side.ours, name))
        relu = call(side.stax.Relu)
        return Case(run=lambda: run(x), forward=lambda: relu(x))

    return Workload(
        f"infinite/any/{name}/{n}",
        build,
        peer=peer,
        targets=(Target("over_forward", 1.5),),
        rtol=1e-3,
        memory=peer is not None,
    )


_NAMES = ("tanh", "arctan", "softplus", "silu", "mish", "elu", "selu")
_BENT = ("hardtanh", "relu6", "clip", "hard_swish")

WORKLOADS = [
    any_function("tanh", "neural-tangents", 500),
    any_function("arctan", "neural-tangents", 500),
    *(any_function(name, None, 2500) for name in _NAMES + _BENT),
]
