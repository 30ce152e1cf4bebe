'''The network graph: nodes, hyperparameters, composition, and the walk over them.

A network is a tree of nodes: a node for each layer, `Serial`, `Parallel` and `Repeat` to compose
them. A node is a frozen dataclass. Fields are static (structure: sizes, axes, names) unless they
are declared with `hyper()`: those are the leaves of the node as a pytree. They may be floats,
arrays or tracers, so that one compiled program serves every value of them and kernels can be
differentiated in them.

How to write a node (a nonlinearity; init, apply, mask and rule stand in one file):

```python
@node
class ErfNode(Node):
    """y = a erf(b x) + c."""

    a: float = hyper(1.0)
    b: float = hyper(1.0)
    name = "Erf"  # no annotation: a class attribute, not a field; used in error messages
    gaussian_input = True  # refuse a non-Gaussian input ("put a Dense or Conv before it")

    def gaussian(self, incoming: bool) -> bool:  # is the output Gaussian?
        return False

    # out_shape, init_params and mask_out have defaults: same shape, `()`, same mask.

    def apply(self, params, x, *, mask=None, **kwargs):
        return self.a * erf(self.b * x)

    def needs(self, need):  # layouts needed at the input for `need` at the output
        return Need(need.tile, max(need.side, Layout.DIAGONAL))  # variances of both sides

    def rule(self, context, tile):
        var1, var2 = context.variances  # broadcast against tile.cov12
        nngp, d_nngp = dual(tile.cov12, var1, var2, ...)
        ntk = None if tile.ntk is None else d_nngp * tile.ntk
        return Tile(nngp, ntk)


def Erf(a=1.0, b=1.0, c=0.0):
    return Layer(ErfNode(a, b, c))
```

The same rule runs on the pairs (a, a) to give the variances (the side pass): there `tile.ntk` is
`None` and `context.all_pairs` is (most often) `False`; a rule that uses `context.variances` need
not care. Nodes with several inputs (`FanInSum`, ...) set `many_inputs = True` and get lists.
'''

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from tangents._infinite.masking import zero_fill
from tangents._infinite.tile import Context, Layout, Need, Signal

Shape = tuple[int, ...]
_N = TypeVar("_N", bound=type)


def hyper(default: Any = dataclasses.MISSING) -> Any:
    """Declare a field of a node as a hyperparameter: a leaf (or subtree) of the node's pytree."""
    return dataclasses.field(default=default, metadata={"hyper": True})


@dataclass_transform(frozen_default=True, field_specifiers=(hyper,))
def node(cls: _N) -> _N:
    """Make a class a node: a frozen dataclass and a pytree, `hyper()` fields its children."""
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=True)(cls)
    fields = dataclasses.fields(cls)
    dynamic = tuple(f.name for f in fields if f.metadata.get("hyper"))
    static = tuple(f.name for f in fields if not f.metadata.get("hyper"))

    def flatten_with_keys(self):
        children = tuple((jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in dynamic)
        return children, tuple(getattr(self, n) for n in static)

    def flatten(self):
        return tuple(getattr(self, n) for n in dynamic), tuple(getattr(self, n) for n in static)

    def unflatten(aux, children):
        # Not through __init__: JAX unflattens with placeholders that no check would accept.
        self = object.__new__(cls)
        for names, values in ((static, aux), (dynamic, children)):
            for n, v in zip(names, values, strict=True):
                object.__setattr__(self, n, v)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


class Node:
    """One layer. See the head of this file for how to write one; defaults are those of Identity."""

    name: str = "Node"
    many_inputs: bool = False
    gaussian_input: bool = False
    mixes_examples: bool = False  # one output example depends on several input examples
    needs_side_pairs: bool = False  # the rule needs all pairs (a, a') of one side, not only (a, a)
    stochastic: bool = False  # apply needs `rng`
    random_weights: bool = False  # fresh random weights: outputs are independent of all others
    kernel_warning: str | None = None  # what every call of kernel_fn warns of
    plane_wise: bool = False  # the rule keeps the difference of positions (see `planes.py`)
    side_maker: Any = None  # Partial(var1, var2) -> Prepared: what the rule reads of one side each
    reads_norm: bool = False  # of variances the rule reads sqrt(var1 var2) (`Context.norm`)
    takes_rest: bool = False  # the rule takes a tile whose ntk is a `Rest`
    closes_planes: str = ""  # how it mixes them: windows, everything; flatten: takes equal ones

    # ---- shapes and static description -------------------------------------------------------

    def out_shape(self, shape: Any) -> Any:
        """Shape of the output for an input shape; -1 is an unknown batch size."""
        return shape

    def gaussian(self, incoming: bool) -> bool:
        """Is the output, at infinite width, a Gaussian process over channels?"""
        return incoming

    def signal(self, signal: Any) -> Any:
        """Description of the output; raises where the infinite-width limit is not defined."""
        if self.gaussian_input and not signal.is_gaussian:
            raise ValueError(
                f"the input to {self.name} must be Gaussian, and it is not: put a layer with "
                "random weights (Dense, Conv, ...) directly before it"
            )
        return signal.replace(
            shape=self.out_shape(signal.shape),
            is_gaussian=self.gaussian(signal.is_gaussian),
            drawn=signal.drawn or self.random_weights,
        )

    # ---- finite width ------------------------------------------------------------------------

    def init_params(self, rng: jax.Array, shape: Any) -> Any:
        """Random parameters for an input shape."""
        return ()

    def init(self, rng: jax.Array, shape: Any) -> tuple[Any, Any]:
        """`(output_shape, params)`."""
        return self.out_shape(shape), self.init_params(rng, shape)

    def apply(self, params: Any, x: Any, *, mask: Any = None, **kwargs: Any) -> Any:
        """The layer itself; masked entries of `x` are zero already."""
        raise NotImplementedError(f"{self.name} has no finite-width apply_fn")

    def mask_out(self, mask: Any, shape: Any) -> Any:
        """Mask of the output for a mask (not None, broadcastable to `shape`) of the input."""
        return mask

    def forward(self, params: Any, x: Any, mask: Any, **kwargs: Any) -> tuple[Any, Any]:
        """`(output, mask)`: what composition calls."""
        shape = jax.tree.map(jnp.shape, x) if self.many_inputs else jnp.shape(x)
        x = zero_fill(x, mask)
        y = self.apply(params, x, mask=mask, **kwargs)
        masked = jax.tree.leaves(mask)
        return y, self.mask_out(mask, shape) if masked else None

    # ---- infinite width ----------------------------------------------------------------------

    def needs(self, need: Any) -> Any:
        """Layouts needed at the input so that the output has `need`."""
        return need

    def rule(self, context: Context, tile: Any) -> Any:
        """Covariances after the layer from those before it."""
        raise NotImplementedError(f"the infinite-width limit of {self.name} is not there yet")

    def out_layout(self, layout: Layout, wanted: Layout) -> Layout:
        """Layout of the rule's result, for the layout that comes in and the one that is wanted."""
        return layout

    def plane_strides(self, signal: Any) -> tuple[int, ...]:
        """Steps along the spatial axes of a `plane_wise` layer."""
        return (1,) * len(signal.spatial)

    def parts_apart(self, state: Any) -> bool:
        """Has the rule for planes `Planes.apart` parts that it keeps apart itself?"""
        return False

    def by_library(self, state: Any) -> bool:
        """Are these variances computed by a library?"""
        return False

    def plane_windows(self, signal: Any) -> list:
        """Windows along the spatial axes of a `plane_wise` layer; none if it has none."""
        return []

    def input_axes(self) -> Any:
        """`(batch_axis, channel_axis)` this node reads its input by; `None` = it does not care.

        A channel axis of `None` says that channels mean nothing: the input is flattened.
        """
        return None

    def out_examples(self, index: Any, out: Signal) -> Any:
        """Numbers of the output's examples from those of the input's (see `Context.same`)."""
        return index

    def children(self) -> tuple[Node, ...]:
        """Nodes inside this one."""
        return ()


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Put the place in the network in front of an error raised inside."""
    try:
        yield
    except (ValueError, NotImplementedError, TypeError) as error:
        if type(error) not in (ValueError, NotImplementedError, TypeError):
            raise  # JAX's own subclasses carry more than a message
        places, text = getattr(error, "tangents_place", ((), str(error)))
        places = (place, *places)
        located = type(error)(f"{' > '.join(places)}: {text}")
        located.tangents_place = (places, text)  # pyright: ignore[reportAttributeAccessIssue]
        raise located from error


def _split(rng: Any, n: int) -> list:
    return [None] * n if rng is None else list(jax.random.split(rng, n)) if n else []


def walk(root: Node, visit: Callable[[Node], Any]) -> Iterator[Any]:
    """`visit(node)` for every node of a graph, outer ones first."""
    yield visit(root)
    for child in root.children():
        yield from walk(child, visit)


def any_node(root: Node, condition: Callable[[Node], bool]) -> bool:
    """Does any node of the graph satisfy the condition?"""
    return any(walk(root, condition))


@node
class Serial(Node):
    """Layers one after another; parameters are a list."""

    nodes: tuple[Node, ...] = hyper(())
    start: int = 0  # place of the first layer, for messages: a segment of a network knows its own
    name = "serial"

    def children(self):
        return self.nodes

    def places(self) -> Iterator[tuple[str, Node]]:
        """`(place, node)` for error messages and `explain`."""
        for i, child in enumerate(self.nodes, self.start):
            yield f"layer {i} ({child.name})", child

    def out_shape(self, shape):
        for place, child in self.places():
            with at(place):
                shape = child.out_shape(shape)
        return shape

    def signal(self, signal):
        for place, child in self.places():
            with at(place):
                signal = child.signal(signal)
        return signal

    def init(self, rng, shape):
        params = []
        for (place, child), key in zip(self.places(), _split(rng, len(self.nodes)), strict=True):
            with at(place):
                shape, p = child.init(key, shape)
            params.append(p)
        return shape, params

    def forward(self, params, x, mask, *, rng=None, **kwargs):
        keys = _split(rng, len(self.nodes))
        for (place, child), p, key in zip(self.places(), params, keys, strict=True):
            with at(place):
                x, mask = child.forward(p, x, mask, rng=key, **kwargs)
        return x, mask

    def needs(self, need):
        for child in reversed(self.nodes):
            need = child.needs(need)
        return need


@node
class Parallel(Node):
    """Layers side by side on a list of inputs; parameters are a list, outputs a list."""

    nodes: tuple[Node, ...] = hyper(())
    name = "parallel"
    many_inputs = True

    def children(self):
        return self.nodes

    def places(self) -> Iterator[tuple[str, Node]]:
        """`(place, node)` for error messages and `explain`."""
        for i, child in enumerate(self.nodes):
            yield f"branch {i} ({child.name})", child

    def _check(self, inputs) -> None:
        if not isinstance(inputs, (list, tuple)) or len(inputs) != len(self.nodes):
            n = len(inputs) if isinstance(inputs, (list, tuple)) else "one that is not a list of"
            raise ValueError(
                f"parallel of {len(self.nodes)} layers needs a list of as many inputs, and got "
                f"{n} inputs: put a FanOut({len(self.nodes)}) before it"
            )

    def out_shape(self, shape):
        self._check(shape)
        out = []
        for (place, child), s in zip(self.places(), shape, strict=True):
            with at(place):
                out.append(child.out_shape(s))
        return type(shape)(out)

    def signal(self, signal):
        self._check(signal)
        out = []
        for (place, child), s in zip(self.places(), signal, strict=True):
            with at(place):
                out.append(child.signal(s))
        return type(signal)(out)

    def init(self, rng, shape):
        self._check(shape)
        shapes, params = [], []
        keys = _split(rng, len(self.nodes))
        for (place, child), key, s in zip(self.places(), keys, shape, strict=True):
            with at(place):
                s, p = child.init(key, s)
            shapes.append(s)
            params.append(p)
        return type(shape)(shapes), params

    def forward(self, params, x, mask, *, rng=None, **kwargs):
        self._check(x)
        masks = mask if mask is not None else [None] * len(x)
        keys = _split(rng, len(self.nodes))
        out = []
        for (place, child), p, u, m, key in zip(self.places(), params, x, masks, keys, strict=True):
            with at(place):
                out.append(child.forward(p, u, m, rng=key, **kwargs))
        return type(x)(y for y, _ in out), [m for _, m in out]

    def needs(self, need):
        # A list of needs, one an input; `need` may itself be a list or one for all outputs.
        each = need if isinstance(need, list) else [need] * len(self.nodes)
        return [child.needs(n) for child, n in zip(self.nodes, each, strict=True)]


def join_needs(need: Any) -> Need:
    """One need that serves a list of them."""
    if isinstance(need, Need):
        return need
    joined = Need(Layout.NONE, Layout.NONE)
    for n in need:
        joined = joined.join(join_needs(n))
    return joined


@node
class Repeat(Node):
    """The same layer `n` times, with own parameters each, stacked on axis 0."""

    node: Node = hyper()
    n: int = 1
    name = "repeat"

    def children(self):
        return (self.node,)

    @property
    def place(self) -> str:
        return f"repeated ({self.node.name})"

    def out_shape(self, shape):
        if self.n == 0:
            return shape
        with at(self.place):
            out = self.node.out_shape(shape)
        if out != shape:
            raise ValueError(
                f"repeat needs a layer whose output has the shape of its input, and got "
                f"{shape} -> {out}"
            )
        return out

    def signal(self, signal):
        for _ in range(min(self.n, 2)):  # the second time sees what the first one leaves
            before = signal
            with at(self.place):
                signal = self.node.signal(signal)
            if jax.tree.map(lambda s: s.shape, before) != jax.tree.map(lambda s: s.shape, signal):
                raise ValueError("repeat needs a layer whose output has the shape of its input")
        return signal

    def init(self, rng, shape):
        self.out_shape(shape)
        if self.n == 0:
            return shape, ()
        keys = jax.random.split(rng, self.n)
        return shape, jax.vmap(lambda k: self.node.init(k, shape)[1])(keys)

    def forward(self, params, x, mask, *, rng=None, **kwargs):
        if self.n == 0:
            return x, mask
        keys = None if rng is None else jax.random.split(rng, self.n)

        def step(carry, per_layer):
            p, key = per_layer
            y, m = carry
            y, m = self.node.forward(p, y, m, rng=key, **kwargs)
            return (y, m), None

        with at(self.place):
            if jax.tree.leaves(mask):
                # The mask's shape may change once (channels collapse): the first is outside.
                first = jax.tree.map(lambda a: a[0], (params, keys))
                (x, mask), _ = step((x, mask), first)
                params, keys = jax.tree.map(lambda a: a[1:], (params, keys))
            (x, mask), _ = jax.lax.scan(step, (x, mask), (params, keys))
        return x, mask

    def needs(self, need):
        for _ in range(min(self.n, 3)):  # layouts only grow, and there are three of them
            need = join_needs(need).join(join_needs(self.node.needs(need)))
        return need


def first_axes(node: Node) -> Any:
    """`input_axes` of a graph: those of the first node that cares, a list for parallel inputs."""
    if isinstance(node, Serial):
        for child in node.nodes:
            axes = first_axes(child)
            if axes is not None and not (isinstance(axes, list) and all(a is None for a in axes)):
                return axes
        return None
    if isinstance(node, Parallel):
        return [first_axes(child) for child in node.nodes]
    if isinstance(node, Repeat):
        return first_axes(node.node) if node.n else None
    return node.input_axes()
