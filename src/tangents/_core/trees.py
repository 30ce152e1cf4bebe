"""Parameters as trees: which leaves are differentiated, and how the others are carried.

Floating-point leaves are differentiated. Integers, keys, `None`, strings and any other object are
carried unchanged. A complex leaf counts as two real ones, its real and imaginary part, so that

    Θ = J_re J_reᵀ + J_im J_imᵀ

is the kernel of gradient descent on both parts (the convention of `jax.grad` up to conjugation).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from tangents._core.typing import Array, PyTree


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of data: of JAX (tracers and keys too) or of NumPy."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OUS"
    return isinstance(leaf, jax.Array)


def is_differentiable(leaf: Any) -> bool:
    """Whether a leaf is floating point or complex: an array or a Python number."""
    if not is_array(leaf) and not isinstance(leaf, float | complex):
        return False
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


class Partition:
    """Split of a tree into real differentiable leaves and everything else.

    `leaves` is a list of real arrays; `merge(leaves)` rebuilds the tree. The carried leaves are
    held by the instance, so under `jit` it must be made and used within one trace.
    """

    def __init__(self, tree: PyTree):
        """Split `tree`."""
        flat, self._treedef = tree_util.tree_flatten(tree)
        self.paths = [
            tree_util.keystr(path) for path, _ in tree_util.tree_flatten_with_path(tree)[0]
        ]
        self._carried = [None if is_differentiable(leaf) else leaf for leaf in flat]
        self._complex = [is_differentiable(leaf) and jnp.iscomplexobj(leaf) for leaf in flat]
        self._differentiated = [is_differentiable(leaf) for leaf in flat]
        self.leaves: list[Array] = []
        self.names: list[str] = []
        for leaf, name, real, cplx in zip(
            flat, self.paths, self._differentiated, self._complex, strict=True
        ):
            if not real:
                continue
            value = jnp.asarray(leaf)
            if cplx:
                self.leaves += [jnp.real(value), jnp.imag(value)]
                self.names += [f"{name}.real", f"{name}.imag"]
            else:
                self.leaves.append(value)
                self.names.append(name)

    def merge(self, leaves: list[Array]) -> PyTree:
        """The tree with its differentiable leaves replaced."""
        remaining = iter(leaves)
        flat = []
        for carried, real, cplx in zip(
            self._carried, self._differentiated, self._complex, strict=True
        ):
            if not real:
                flat.append(carried)
            elif cplx:
                real_part, imaginary = next(remaining), next(remaining)
                flat.append(jax.lax.complex(real_part, imaginary))
            else:
                flat.append(next(remaining))
        return tree_util.tree_unflatten(self._treedef, flat)


def describe(tree: PyTree) -> str:
    """Shapes of a tree, as an error message shows them: `(3, 4)` or `{'a': (3,), 'b': ()}`."""
    return repr(tree_util.tree_map(_Shape, tree))


class _Shape:
    """Prints as the shape of a leaf, or as its type where it has none."""

    def __init__(self, leaf: Any):
        has_shape = hasattr(leaf, "shape") or isinstance(leaf, bool | int | float | complex)
        self.text = repr(tuple(getattr(leaf, "shape", ()))) if has_shape else type(leaf).__name__

    def __repr__(self) -> str:
        return self.text
