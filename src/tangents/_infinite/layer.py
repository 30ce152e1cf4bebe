"""A layer: the triple `(init_fn, apply_fn, kernel_fn)` around a node of the network graph.

`init_fn, apply_fn, kernel_fn = layer` unpacks, `layer[2]` indexes, and every combinator takes
layers and plain triples alike. `kernel_fn` is a callable that owns its graph.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from tangents._core.get import Get, canonical_get, select
from tangents._core.kwargs import same_inputs
from tangents._infinite.execute import run
from tangents._infinite.graph import Node, any_node, first_axes, walk
from tangents._infinite.inputs import check_inputs, collapse_mask
from tangents._infinite.kernel import Kernel, from_state, to_state
from tangents._infinite.masking import join_masks, split_masks
from tangents._infinite.near import near_pairs, refined
from tangents._infinite.planner import (
    Plan,
    batch_sizes,
    cast_hyperparameters,
    check_batch_axes,
    compute,
    describe,
    explanation,
    input_signals,
    loses_digits,
    make_plan,
)
from tangents._infinite.tile import Layout, Need
from tangents._infinite.tiling import (
    bytes_a_pair,
    can_tile,
    eager_tiles,
    stages,
    tile_sizes,
    traced_tiles,
)


class Layer(tuple):
    """A layer of a network: `init_fn, apply_fn, kernel_fn = layer`.

    - `init_fn(rng, input_shape) -> (output_shape, params)`; `input_shape` may be a (nested) list
      of shapes, and -1 stands for an unknown batch size.
    - `apply_fn(params, inputs, rng=None, mask_constant=None, pattern=None, **kwargs) -> outputs`.
    - `kernel_fn(x1, x2=None, get=None, ...)`: see `KernelFn`.

    `layer.node` is its node in the network graph.
    """

    node: Node

    def __new__(cls, node: Node) -> Layer:
        """Make the triple of a node."""
        init_fn, apply_fn = make_init_fn(node), make_apply_fn(node)
        self = super().__new__(cls, (init_fn, apply_fn, KernelFn(node)))
        self.node = node
        return self

    def __getnewargs__(self):
        return (self.node,)

    def __repr__(self):
        return f"Layer({self.node.name})"


def canonical_shape(shape: Any) -> Any:
    """Tuples of ints at the leaves; lists and tuples of shapes stay what they are."""
    if all(not isinstance(s, (list, tuple)) for s in shape):
        return tuple(shape)
    return type(shape)(canonical_shape(s) for s in shape)


def make_init_fn(node: Node) -> Callable[..., Any]:
    """`init_fn(rng, input_shape) -> (output_shape, params)` of a node."""

    def init_fn(rng: jax.Array, input_shape: Any) -> tuple[Any, Any]:
        return node.init(rng, canonical_shape(input_shape))

    init_fn.node = node  # pyright: ignore[reportFunctionMemberAccess]
    init_fn.__name__, init_fn.__qualname__ = node.name, f"{node.name}.init_fn"
    return init_fn


def _like_input(node: Node, x: Any) -> Node:
    """Array hyperparameters in the type of the input, so that strict promotion is no error."""
    leaves = jax.tree.leaves(x)
    floating = [u.dtype for u in leaves if jnp.issubdtype(jnp.result_type(u), jnp.floating)]
    if not floating:
        return node

    def cast(h):
        is_array = hasattr(h, "dtype") and jnp.issubdtype(h.dtype, jnp.floating)
        return jnp.asarray(h).astype(floating[0]) if is_array and h.dtype != floating[0] else h

    return jax.tree.map(cast, node)


def make_apply_fn(node: Node) -> Callable[..., Any]:
    """`apply_fn(params, inputs, ...)` of a node."""

    def apply_fn(
        params: Any,
        inputs: Any,
        rng: jax.Array | None = None,
        mask_constant: float | None = None,
        pattern: Any = None,
        **kwargs: Any,
    ) -> Any:
        x, mask = split_masks(inputs, mask_constant)
        y, mask = _like_input(node, x).forward(params, x, mask, rng=rng, pattern=pattern, **kwargs)
        return join_masks(y, mask)

    apply_fn.node = node  # pyright: ignore[reportFunctionMemberAccess]
    apply_fn.__name__, apply_fn.__qualname__ = node.name, f"{node.name}.apply_fn"
    return apply_fn


class KernelFn:
    """`kernel_fn(x1, x2=None, get=None, ...)`: kernels of a network of infinite width.

    Args:
      x1: inputs, an array (N1, ...) of at least two axes, a (nested) list of them where the network
        takes several inputs, or a `Kernel` to continue from.
      x2: inputs (N2, ...); `None` is x1.
      get: which kernels: `None` for a whole `Kernel`, a name ('ntk', 'nngp', 'cov1', ...: any
        field of `Kernel`) for one array, a tuple of names for a named tuple of arrays. The tangent
        kernel is computed only if it is asked for.
      pattern: pair of graph patterns, of x1 and of x2 (see `stax.Aggregate`).
      mask_constant: inputs of this value (may be nan) are missing.
      diagonal_batch: `False` keeps covariances of all pairs of examples within x1 and within x2.
      diagonal_spatial: `True`: of outputs with spatial axes only equal positions are computed.
        Where the network itself needs no more than that (it ends in `Flatten`, say), no more is
        computed anyway.
      memory: bytes (or text such as '2GiB') that the computation may use; default half of what is
        free. Examples are split into tiles to stay within it.
      progress: shows how many of these tiles are done: a function from an iterable to an iterable,
        such as `tqdm.tqdm`. Not under tracing.
      **kwargs: handed to user-written layers.

    Returns:
      What `get` says; a list of such where the network has several outputs.

    Inputs are converted to the canonical floating-point type. Works under `jit`, `vmap`, `grad`,
    in inputs and hyperparameters. Where two inputs are equal, kernels of ReLU-like networks have a
    cusp; the gradient there is the symmetric subgradient.

    In single precision, networks that mix positions (pooling, attention) lose half of the digits at
    pairs of nearly parallel inputs: outside of `jit` and `grad` these pairs are computed again in
    float64, at several times their cost.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tangents import stax
        >>> _, _, kernel_fn = stax.serial(stax.Dense(8), stax.Erf(), stax.Dense(1))
        >>> kernel_fn(jnp.eye(3), None, "ntk").shape
        (3, 3)
    """

    def __init__(self, node: Node):
        """Own the graph of `node`."""
        self.node = node
        self.__name__ = node.name

    def __repr__(self):
        return f"<kernel_fn of {self.node.name}>"

    @property
    def input_req(self) -> Mapping[str, Any]:
        """What the network asks of its input, by the names of `stax.requires`."""
        axes = first_axes(self.node)
        batch, channel = axes if isinstance(axes, tuple) else (0, -1)
        return MappingProxyType(
            {
                "batch_axis": batch,
                "channel_axis": channel,
                "diagonal_batch": not any_node(self.node, lambda n: n.needs_side_pairs),
                "use_dropout": any_node(self.node, lambda n: n.stochastic),
            }
        )

    def __call__(
        self,
        x1: Any,
        x2: Any = None,
        get: Get = None,
        *,
        pattern: Any = None,
        mask_constant: float | None = None,
        diagonal_batch: bool | None = None,
        diagonal_spatial: bool | None = None,
        memory: Any = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        names = canonical_get(get)
        asked = (names,) if isinstance(names, str) else names
        want_ntk = asked is None or "ntk" in asked
        want_sides = asked is None or "cov1" in asked or "cov2" in asked
        for text in dict.fromkeys(walk(self.node, lambda node: node.kernel_warning)):
            if text is not None:
                warnings.warn(text, stacklevel=2)
        for name in asked or ():
            if name not in Kernel.__dataclass_fields__:
                raise KeyError(f"kernel_fn: get={get!r}: a Kernel has no field {name!r}")
        if is_kernel(x1):
            if x2 is not None:
                raise ValueError("kernel_fn: x2 must be None where x1 is a Kernel")
            result = self._from_kernel(x1, want_ntk, want_sides, pattern, diagonal_spatial, kwargs)
        else:
            x1 = check_inputs(x1, "x1")
            x2 = None if x2 is None else check_inputs(x2, "x2")
            plan = make_plan(self.node, x1, want_ntk, want_sides, diagonal_batch, diagonal_spatial)
            result = self._from_inputs(
                plan, x1, x2, pattern, mask_constant, memory, progress, kwargs
            )
        return choose(result, names)

    def _from_kernel(self, kernel, want_ntk, want_sides, pattern, diagonal_spatial, kwargs):
        node = cast_hyperparameters(self.node)
        leaf = kernel
        while isinstance(leaf, (list, tuple)):
            leaf = leaf[0]
        diagonal = leaf.diagonal_spatial if diagonal_spatial is None else diagonal_spatial
        layout = Layout.DIAGONAL if diagonal else Layout.FULL
        need = Need(layout, layout if want_sides else Layout.NONE)
        state = run(node, to_state(kernel), need, _pattern_pair(pattern), _extra(kwargs, pattern))
        return from_state(state, leaf.x1_is_x2, want_ntk)

    def _from_inputs(self, plan: Plan, x1, x2, pattern, *others):
        n1, n2 = batch_sizes(plan, x1, x1 if x2 is None else x2)
        if (n1 and n2) or plan.side_pairs:
            return self._from_examples(plan, x1, x2, pattern, *others)
        # What there is none of is computed of one example, and cut.
        stand1 = _one_for_none(x1, plan.axes)
        stand2 = None if x2 is None else _one_for_none(x2, plan.axes)
        if pattern is not None:
            pattern = tuple(None if p is None else _one_for_none(p, (0,)) for p in pattern)
        result = self._from_examples(plan, stand1, stand2, pattern, *others)
        return _without_second_side(_first_of(result, n1, n2), x2 is None)

    def _from_examples(self, plan: Plan, x1, x2, pattern, mask_constant, memory, progress, kwargs):
        check_batch_axes(plan)
        patterns = _pattern_pair(pattern)
        equal = same_inputs(x1, x2)
        x1, mask1 = split_masks(x1, mask_constant)
        x2, mask2 = (None, None) if x2 is None else split_masks(x2, mask_constant)
        mask1, mask2 = _collapse(mask1, plan.axes), _collapse(mask2, plan.axes)
        symmetric = x2 is None
        if symmetric and patterns[0] is not patterns[1]:
            x2, mask2 = x1, mask1  # one input on two graphs: its sides differ
        node = cast_hyperparameters(self.node)
        n1, n2 = batch_sizes(plan, x1, x1 if x2 is None else x2)
        sides = ((x1, mask1, patterns[0]), (x2, mask2, patterns[1]))

        def tile(i1, i2, one_block, node=node):
            (a, m1, p1), (b, m2, p2) = sides
            if i1 is not None:
                a, m1, p1 = _take(a, m1, p1, i1, plan.axes)
                if x2 is None and not one_block:
                    b, m2, p2 = _take(x1, mask1, patterns[0], i2, plan.axes)
                elif x2 is not None:
                    b, m2, p2 = _take(b, m2, p2, i2, plan.axes)
                if one_block:
                    p2 = p1
            index = (None, None)
            if equal is not False:
                index = (
                    jnp.arange(n1) if i1 is None else jnp.asarray(i1),
                    jnp.arange(n2) if i2 is None else jnp.asarray(i2),
                )
            extra = _extra(kwargs, pattern)
            state = compute(node, plan, a, b, m1, m2, jnp.asarray(equal), index, (p1, p2), extra)
            kernel = from_state(state, None, plan.want_ntk)
            return _set_x1_is_x2(kernel, jnp.asarray(equal))

        tracing = any(isinstance(u, Tracer) for u in jax.tree.leaves((x1, x2, node, patterns)))
        if memory is None and tracing:
            return _without_second_side(tile(None, None, False), symmetric)
        sizes = self._tile_sizes(node, plan, x1, n1, n2, memory)
        one_batch = symmetric and x2 is None
        if sizes is None or sizes == (n1, n2):
            result = _without_second_side(tile(None, None, False), symmetric)
        elif tracing:
            return traced_tiles(tile, n1, n2, sizes[0], sizes[1], one_batch)
        else:
            result = eager_tiles(tile, n1, n2, sizes[0], sizes[1], one_batch, progress)
        if tracing or sizes is None or not loses_digits(plan, input_signals(plan, x1)):
            return result
        near = near_pairs(x1, x2, plan.axes, bool(equal))
        with jax.enable_x64(True):
            wide = functools.partial(tile, node=cast_hyperparameters(self.node))
        return refined(result, near, one_batch, max(min(sizes) // 2, 1), wide)

    def _tile_sizes(self, node, plan: Plan, x1, n1: int, n2: int, memory) -> Any:
        """Tile sizes for the budget, or None where examples cannot be taken apart."""
        if not can_tile(node, plan.side_pairs):
            if memory is not None:
                raise ValueError(
                    f"kernel_fn: memory={memory!r}: a layer of this network may mix examples, so "
                    "they cannot be computed in tiles: leave memory=None"
                )
            return None
        if not n1 or not n2:
            return None
        pair = bytes_a_pair(node, input_signals(plan, x1), plan.need, plan.want_ntk)
        return tile_sizes(n1, n2, pair, memory)

    def explain(self, x1: Any, x2: Any = None, get: Get = None, **kwargs: Any) -> str:
        """What `kernel_fn(x1, x2, get, ...)` computes, layer by layer, as a table.

        Args:
          x1: inputs, or anything with their shapes.
          x2: inputs, or None.
          get: as in a call.
          **kwargs: `diagonal_batch`, `diagonal_spatial`, `memory` as in a call.

        Returns:
          A text: one line for each layer with its place, the shape of its output, the layout of its
          covariance (pairs of positions: all, or equal ones only), that of the two sides, and the
          bytes of one array; then how the pairs of examples are cut into tiles, and how each tile
          is computed.

        Examples:
            >>> import jax.numpy as jnp
            >>> from tangents import stax
            >>> _, _, kernel_fn = stax.serial(stax.Conv(4, (3,)), stax.Relu(), stax.Flatten())
            >>> print(kernel_fn.explain(jnp.ones((2, 8, 1)), get="nngp"))
            layer              output     pairs of positions  sides  one array
            layer 0 (Conv)     (2, 6, 4)  equal               equal  96 B
            layer 1 (Relu)     (2, 6, 4)  equal               none   96 B
            layer 2 (Flatten)  (2, 24)    -                   none   16 B
            examples: 2 x 2 pairs in one tile
            computed (trivial): all pairs at once
        """
        memory = kwargs.pop("memory", None)
        names = canonical_get(get)
        asked = (names,) if isinstance(names, str) else names
        want_ntk = asked is None or "ntk" in asked
        want_sides = asked is None or "cov1" in asked or "cov2" in asked
        plan = make_plan(
            self.node,
            x1,
            want_ntk,
            want_sides,
            kwargs.get("diagonal_batch"),
            kwargs.get("diagonal_spatial"),
        )
        n1, n2 = batch_sizes(plan, x1, x1 if x2 is None else x2)
        listed, _ = stages(self.node, input_signals(plan, x1), plan.need)
        sizes = self._tile_sizes(self.node, plan, x1, n1, n2, memory)
        return f"{explanation(listed, n1, n2, sizes)}\n{describe(self.node, plan, x1, x2)}"


def _extra(kwargs: dict[str, Any], pattern: Any) -> dict[str, Any]:
    """Keyword arguments for functions of the user's own."""
    return dict(kwargs) if pattern is None else {**kwargs, "pattern": pattern}


def _take(x: Any, mask: Any, pattern: Any, index: Any, axes: Any) -> tuple[Any, Any, Any]:
    """Some examples of an input, its mask and its pattern."""

    def each(u, a):
        if isinstance(u, list):
            return [each(v, b) for v, b in zip(u, a, strict=True)]
        return u if u is None else jnp.take(u, index, axis=a[0])

    pattern = None if pattern is None else jnp.take(pattern, index, axis=0)
    return each(x, axes), each(mask, axes), pattern


def _one_for_none(x: Any, axes: Any) -> Any:
    """An input, with an example of zeros if it has none."""
    if isinstance(x, list):
        return [_one_for_none(u, a) for u, a in zip(x, axes, strict=True)]

    def pad(u):
        widths = [(0, 0)] * u.ndim
        widths[axes[0]] = (0, 0 if u.shape[axes[0]] else 1)
        return jnp.pad(u, widths)

    return jax.tree.map(pad, x)


def _first_of(kernel: Any, n1: int, n2: int) -> Any:
    """The kernel of so many examples."""
    if isinstance(kernel, list):
        return [_first_of(k, n1, n2) for k in kernel]
    return kernel.slice(slice(n1), slice(n2))


def _set_x1_is_x2(kernel: Any, value: Any) -> Any:
    if isinstance(kernel, list):
        return [_set_x1_is_x2(k, value) for k in kernel]
    return kernel.replace(x1_is_x2=value)


def _without_second_side(kernel: Any, symmetric: bool) -> Any:
    """With x2 = None the second side is the first, and not repeated."""
    if isinstance(kernel, list):
        return [_without_second_side(k, symmetric) for k in kernel]
    return kernel.replace(cov2=None) if symmetric else kernel


def is_kernel(x: Any) -> bool:
    """Is the input a Kernel or a tree of them?"""
    if isinstance(x, (list, tuple)) and x:
        return all(is_kernel(u) for u in x)
    return isinstance(x, Kernel)


def choose(result: Any, names: Any) -> Any:
    """What `get` asks of a Kernel, or of each of a list of them."""
    if isinstance(result, (list, tuple)):
        return [choose(r, names) for r in result]
    return result if names is None else select("AnalyticKernel", names, result.asdict())


def _pattern_pair(pattern: Any) -> tuple[Any, Any]:
    if pattern is None:
        return (None, None)
    if not isinstance(pattern, (list, tuple)) or len(pattern) != 2:
        raise ValueError(
            "kernel_fn: pattern must be a pair (pattern of x1, pattern of x2), also with x2=None"
        )
    return tuple(pattern)


def _collapse(mask: Any, axes: Any) -> Any:
    if isinstance(mask, list):
        return [_collapse(m, a) for m, a in zip(mask, axes, strict=True)]
    return mask if mask is None or not isinstance(axes[1], int) else collapse_mask(mask, axes[1])
