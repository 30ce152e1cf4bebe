"""Combinators (`serial`, `parallel`, `repeat`) and layers of a user's own (`layer`, ...).

A layer of a user's own is a function that returns `(init_fn, apply_fn, kernel_fn)` with a
`kernel_fn` from `Kernel` to `Kernel`. In the graph it is a node that cuts the walk: a Kernel is put
together before it and taken apart after it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any

import jax

from tangents._infinite.execute import fit
from tangents._infinite.graph import Node, Parallel, Repeat, Serial, node
from tangents._infinite.kernel import from_state, to_state
from tangents._infinite.layer import KernelFn, Layer
from tangents._infinite.masking import join_masks, split_masks
from tangents._infinite.tile import Layout, Need


class Bool(enum.IntEnum):
    """Three-valued logic: `&` is the minimum."""

    NO = 0
    MAYBE = 1
    YES = 2

    def __and__(self, other: int) -> Bool:
        return Bool(min(int(self), int(other)))

    __rand__ = __and__


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """Can a layer do with the covariance of equal positions only?

    Args:
      input: does it accept an input that holds equal positions only.
      output: `YES` if equal positions of its input suffice whatever follows (it removes the spatial
        axes, say), `NO` if that depends on what follows.

    `a >> b` is the requirement of the layers one after another, `a & b` of layers side by side;
    `bool(d)` says whether equal positions suffice throughout.

    Examples:
        >>> from tangents import stax
        >>> convolution = stax.Diagonal()
        >>> flatten, pool = (stax.Diagonal(b, stax.Bool.YES) for b in (stax.Bool.YES, stax.Bool.NO))
        >>> bool(convolution >> flatten), bool(convolution >> pool)
        (True, False)
    """

    input: Bool = Bool.YES
    output: Bool = Bool.NO

    def __rshift__(self, other: Diagonal) -> Diagonal:
        # A layer whose output may be diagonal whatever follows hides what follows.
        reads = self.input if self.output == Bool.YES else self.input & other.input
        return Diagonal(reads, max(self.output, other.output))

    def __lshift__(self, other: Diagonal) -> Diagonal:
        return other >> self

    def __and__(self, other: Diagonal) -> Diagonal:
        return Diagonal(self.input & other.input, self.output & other.output)

    def __bool__(self) -> bool:
        return self.input == Bool.YES and self.output > Bool.NO


def requires(**requirements: Any) -> Callable[[Callable], Callable]:
    """State what a `Kernel -> Kernel` function of one's own needs of its input.

    Args:
      **requirements: `diagonal_spatial` (a `Diagonal` or bool: may the input hold equal positions
        only), `diagonal_batch` (may covariances within a side hold the pairs (a, a) only),
        `batch_axis` and `channel_axis` (the axes of the input; None = any), `use_dropout`.

    Returns:
      A decorator; it sets the attribute `input_req`.
    """
    known = {"diagonal_batch", "diagonal_spatial", "batch_axis", "channel_axis", "use_dropout"}
    unknown = set(requirements) - known
    if unknown:
        raise ValueError(f"requires: {sorted(unknown)} are not among {sorted(known)}")

    def decorate(kernel_fn):
        kernel_fn.input_req = dict(requirements)
        return kernel_fn

    return decorate


def supports_masking(remask_kernel: bool) -> Callable[[Callable], Callable]:
    """Make a layer of one's own take masks; goes between `layer` and the function.

    Args:
      remask_kernel: zero the covariances of masked positions after the layer.

    Returns:
      A decorator of functions that return `(init_fn, apply_fn, kernel_fn)` or these with a fourth,
      `mask_fn(mask, input_shape) -> mask`. Their `apply_fn` is called with `mask=` (an array or
      None) and reads zeros where it is true.
    """

    def decorate(make):
        @functools.wraps(make)
        def masked(*args, **kwargs):
            parts = make(*args, **kwargs)
            mask_fn = parts[3] if len(parts) == 4 else None
            return _Masked(parts[:3], mask_fn, remask_kernel)

        return masked

    return decorate


class _Masked(tuple):
    """A triple that takes masks."""

    mask_fn: Any
    remask: bool

    def __new__(cls, parts, mask_fn, remask):
        self = super().__new__(cls, parts)
        self.mask_fn, self.remask = mask_fn, remask
        return self


def layer(make: Callable[..., Any]) -> Callable[..., Layer]:
    """Make a layer of a function that returns `(init_fn, apply_fn, kernel_fn)`.

    Args:
      make: any function whose result is a triple with `init_fn(rng, shape) -> (shape, params)`,
        `apply_fn(params, inputs, **kwargs)`, `kernel_fn(kernel, **kwargs) -> Kernel`.

    Returns:
      A function of the same signature whose result composes with all others, and whose `kernel_fn`
      takes arrays, `get`, and the rest.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> @stax.layer
        ... def Scale(c):
        ...     init_fn = lambda rng, shape: (shape, ())
        ...     apply_fn = lambda params, x, **kwargs: c * x
        ...     kernel_fn = lambda k, **kwargs: k * c
        ...     return init_fn, apply_fn, kernel_fn
        >>> _, _, kernel_fn = stax.serial(stax.Dense(4), Scale(2.0))
        >>> float(kernel_fn(jnp.ones((1, 3)), None, "nngp")[0, 0])
        4.0
    """

    @functools.wraps(make)
    def made(*args, **kwargs):
        result = make(*args, **kwargs)
        return result if isinstance(result, Layer) else Layer(as_node(result, make.__name__))

    return made


@node
class UserNode(Node):
    """A triple of functions with `kernel_fn: Kernel -> Kernel`."""

    init_fn: Any
    apply_fn: Any
    kernel_fn: Any
    mask_fn: Any = None
    remask: bool = False
    masks: bool = False
    name: str = "a layer of your own"

    @property
    def requirements(self) -> dict[str, Any]:
        return getattr(self.kernel_fn, "input_req", {})

    @property
    def mixes_examples(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.needs_side_pairs

    @property
    def needs_side_pairs(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.requirements.get("diagonal_batch") is False

    def input_axes(self):
        batch, channel = (self.requirements.get(k) for k in ("batch_axis", "channel_axis"))
        if batch is None and channel is None:
            return None
        return (0 if batch is None else batch, -1 if channel is None else channel)

    def out_shape(self, shape):
        found = []

        def shape_of(key):
            found.append(self.init_fn(key, shape)[0])
            return ()

        jax.eval_shape(shape_of, jax.random.key(0))
        return found[0]

    def init(self, rng, shape):
        return self.init_fn(rng, shape)

    def signal(self, signal):
        raise NotImplementedError("the description of a user's layer comes from its Kernel")

    def forward(self, params, x, mask, *, rng=None, pattern=None, **kwargs):
        if pattern is not None:
            kwargs["pattern"] = pattern
        if self.masks:
            return super().forward(params, x, mask, rng=rng, **kwargs)
        if jax.tree.leaves(mask):
            raise NotImplementedError(
                f"{self.name} does not take masks: decorate its function with supports_masking"
            )
        return self.apply_fn(params, x, rng=rng, **kwargs), None

    def apply(self, params, x, *, mask=None, **kwargs):
        return self.apply_fn(params, x, mask=mask, **kwargs)

    def mask_out(self, mask, shape):
        return mask if self.mask_fn is None else self.mask_fn(mask, shape)

    def needs(self, need):
        diagonal = self.requirements.get("diagonal_spatial")
        if diagonal is None:
            layout = need.tile
        else:
            may = diagonal.input == Bool.YES if isinstance(diagonal, Diagonal) else bool(diagonal)
            ends = isinstance(diagonal, Diagonal) and diagonal.output == Bool.YES
            layout = Layout.FULL if not may else Layout.DIAGONAL if ends else need.tile
        return Need(layout, layout)

    def run_kernel(self, state, need, patterns, kwargs):
        """The function on Kernels, between two states of the walk."""
        needed = self.needs(need)
        kernel = from_state(fit(state, needed))
        out = self.kernel_fn(kernel, **kwargs)
        if isinstance(out, (list, tuple)):
            return to_state(out)
        return to_state(self._finish(kernel, out))

    def _finish(self, kernel, out):
        shapes = {}
        if not isinstance(kernel, list):
            # Users leave the shapes to us, as they always could.
            for n in ("shape1", "shape2"):
                shapes[n] = self.out_shape(getattr(kernel, n))
        out = out.replace(**shapes)
        if not self.masks or isinstance(kernel, list):
            return out
        masks = [
            None if m is None else self.mask_out(m, s)
            for m, s in ((kernel.mask1, kernel.shape1), (kernel.mask2, kernel.shape2))
        ]
        return out.mask(*masks) if self.remask else out.replace(mask1=masks[0], mask2=masks[1])


@node
class ForeignFunctions(Serial):
    """A node whose init_fn or apply_fn a user replaced (by a jitted one, say); the rule stays."""

    init_fn: Any = None
    apply_fn: Any = None
    name = "a layer with functions of your own"

    def init(self, rng, shape):
        return self.init_fn(rng, shape)

    def forward(self, params, x, mask, **kwargs):
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        if jax.tree.leaves(mask):
            x = join_masks(x, mask)
        return split_masks(self.apply_fn(params, x, **kwargs), None)


def as_node(candidate: Any, name: str | None = None) -> Node:
    """The node of a layer, or of a triple of functions."""
    if isinstance(candidate, Layer):
        return candidate.node
    if not isinstance(candidate, (tuple, list)) or len(candidate) not in (3, 4):
        raise TypeError(
            "a layer is a triple (init_fn, apply_fn, kernel_fn), as every stax function returns; "
            f"got {candidate!r}: call it (stax.Relu(), not stax.Relu)?"
        )
    init_fn, apply_fn, kernel_fn = candidate[:3]
    if isinstance(kernel_fn, KernelFn):
        inner = kernel_fn.node
        if all(getattr(f, "node", None) is inner for f in (init_fn, apply_fn)):
            return inner
        return ForeignFunctions((inner,), 0, init_fn, apply_fn)
    masked = isinstance(candidate, _Masked)
    return UserNode(
        init_fn,
        apply_fn,
        kernel_fn,
        candidate.mask_fn if masked else None,
        candidate.remask if masked else False,
        masked,
        name or getattr(kernel_fn, "__name__", "a layer of your own"),
    )


def serial(*layers: Any) -> Layer:
    """Layers one after another.

    Args:
      *layers: layers, or triples `(init_fn, apply_fn, kernel_fn)`. None at all is the identity.

    Returns:
      A layer; its parameters are the list of theirs.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> init_fn, apply_fn, kernel_fn = stax.serial(stax.Dense(4), stax.Relu(), stax.Dense(2))
        >>> shape, params = init_fn(jax.random.key(0), (-1, 3))
        >>> shape, [len(p) for p in params]
        ((-1, 2), [2, 0, 2])
    """
    return Layer(Serial(tuple(as_node(u) for u in layers)))


def parallel(*layers: Any) -> Layer:
    """Layers side by side, each on its own input of a list.

    Args:
      *layers: layers, or triples `(init_fn, apply_fn, kernel_fn)`.

    Returns:
      A layer from a list of inputs to the list of outputs; its parameters are the list of theirs.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> init_fn, _, _ = stax.parallel(stax.Dense(4), stax.Dense(5))
        >>> init_fn(jax.random.key(0), [(-1, 3), (-1, 2)])[0]
        [(-1, 4), (-1, 5)]
    """
    return Layer(Parallel(tuple(as_node(u) for u in layers)))


def repeat(layer: Any, n: int) -> Layer:
    """The same layer `n` times in a row, with parameters of its own each time.

    The finite network is a loop (`lax.scan`) over parameters stacked on axis 0; the kernel is one
    too, so that compile time does not grow with `n`.

    Args:
      layer: a layer whose output has the shape of its input.
      n: how often; 0 is the identity.

    Raises:
      ValueError: if the shape changes.

    Examples:
        >>> import jax
        >>> from tangents import stax
        >>> init_fn, _, _ = stax.repeat(stax.serial(stax.Relu(), stax.Dense(3)), 5)
        >>> jax.tree.map(lambda p: p.shape, init_fn(jax.random.key(0), (-1, 3))[1])
        [(), ((5, 3, 3), None)]
    """
    if n < 0:
        raise ValueError(f"repeat: n={n} must not be negative")
    return Layer(Repeat(as_node(layer), n))
