"""Marking operations of a TensorFlow graph so that they come through XLA under their own names.

XLA would expand erfc, softplus or relu into what has other derivatives at some points, and drop
`stop_gradient`. Before a graph is lowered, such nodes are replaced by custom calls; the reader of
StableHLO turns these into the functions of JAX (`tangents.frontends.stablehlo.calls`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tangents.frontends.stablehlo.calls import TARGET, UNARY

_NUMBERS = {"LeakyRelu": ("alpha", 0.2)}
_STOPS = {"StopGradient", "PreventGradient"}
_FLOATING = {1, 2, 14, 19}  # DataType: float, double, bfloat16, half


def marked(concrete: Any, *, caller: str) -> Callable[..., Any] | None:
    """A function of the same tensors with its operations marked; None if there are none to mark.

    `concrete` is a `ConcreteFunction`; what it captures is captured again.
    """
    import tensorflow as tf

    graph = concrete.graph.as_graph_def(add_shapes=True)
    if not _mark_graph(graph, caller=caller):
        return None
    # Imported eagerly, functions become known to TensorFlow at large, where XLA looks them up.
    tf.graph_util.import_graph_def(
        tf.compat.v1.GraphDef(library=graph.library, versions=graph.versions), name=""
    )
    placeholders = [tensor.name for tensor in concrete.inputs]
    names = {name.partition(":")[0] for name in placeholders}
    kept = [node for node in graph.node if node.name not in names]
    del graph.node[:]
    graph.node.extend(kept)
    outputs = [tensor.name for tensor in concrete.outputs]
    captured = list(concrete.captured_inputs)
    read = {
        reference
        for node in graph.node
        for reference in (name.lstrip("^").partition(":")[0] for name in node.input)
    }

    def run(*tensors: Any) -> list[Any]:
        # An identity makes a captured eager tensor one of this graph.
        again = [tf.raw_ops.Identity(input=tensor) for tensor in captured]
        inputs = dict(zip(placeholders, [*tensors, *again], strict=True))
        given = {name: value for name, value in inputs.items() if name.partition(":")[0] in read}
        inner = [name for name in outputs if name not in inputs]
        results = tf.graph_util.import_graph_def(
            graph, input_map=given, return_elements=inner, name=""
        )
        found = dict(zip(inner, results, strict=True)) | {
            name: inputs[name] for name in outputs if name in inputs
        }
        return [found[name] for name in outputs]

    return run


def custom_gradients(concrete: Any) -> list[str]:
    """Names of nodes whose derivative was written by hand (`tf.custom_gradient`).

    TensorFlow's own swish is written that way, to save memory; its gradient is the derivative.
    """
    graph = concrete.graph.as_graph_def()
    found = []
    for nodes in [graph.node, *(function.node_def for function in graph.library.function)]:
        by_name = {node.name: node for node in nodes}
        found += [
            node.name
            for node in nodes
            if node.op == "IdentityN"
            and node.attr["_gradient_op_type"].s.startswith(b"CustomGradient")
            and not _is_swish(node, by_name)
        ]
    return found


def _is_swish(node: Any, by_name: dict[str, Any]) -> bool:
    """Whether the first output is a product with a sigmoid."""

    def source(reference: str) -> Any:
        found = by_name.get(reference.partition(":")[0])
        while found is not None and found.op == "Identity":
            found = by_name.get(found.input[0].partition(":")[0])
        return found

    product = source(node.input[0])
    if product is None or product.op != "Mul":
        return False
    return any(getattr(source(name), "op", None) == "Sigmoid" for name in product.input)


def _mark_graph(graph: Any, *, caller: str) -> bool:
    """Mark the nodes of a graph and of its functions; whether there were any."""
    count = sum([_mark(node, caller=caller) for node in graph.node])
    for function in graph.library.function:
        names = {node.name for node in function.node_def if _mark(node, caller=caller)}
        count += len(names)
        # Within a function an input is `node:output name:index`, and the name has changed.
        for node in function.node_def:
            node.input[:] = [_renamed(reference, names) for reference in node.input]
        for name, reference in function.ret.items():
            function.ret[name] = _renamed(reference, names)
    # A changed function under its old name would clash with the one TensorFlow knows.
    suffix = "_tangents"
    known = {function.signature.name for function in graph.library.function}
    for function in graph.library.function:
        function.signature.name += suffix
    for node in _nodes(graph):
        for attribute in node.attr.values():
            for called in [attribute.func, *attribute.list.func]:
                if called.name in known:
                    called.name += suffix
    return count > 0


def _renamed(reference: str, names: set[str]) -> str:
    name, _, rest = reference.partition(":")
    return f"{name}:results:{rest.rpartition(':')[2]}" if rest and name in names else reference


def _nodes(graph: Any) -> Iterator[Any]:
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def


def _mark(node: Any, *, caller: str) -> bool:
    if node.op not in UNARY or node.attr["T"].type not in _FLOATING:
        return False
    shapes = node.attr["_output_shapes"].list.shape
    unknown = not shapes or shapes[0].unknown_rank or any(axis.size < 0 for axis in shapes[0].dim)
    if unknown:
        if node.op in _STOPS:
            raise NotImplementedError(
                f"{caller}: {node.op} at {node.name} has no static shape, so it cannot be carried "
                "over. Give the tensor its shape with tf.ensure_shape before it."
            )
        return False
    kind, target = node.attr["T"].type, TARGET + node.op
    if node.op in _NUMBERS:
        name, default = _NUMBERS[node.op]
        target += f":{node.attr[name].f if name in node.attr else default}"
    inputs = [name for name in node.input if not name.startswith("^")]
    shape = shapes[0]
    del node.input[:]
    node.input.extend(inputs)
    node.op = "XlaCustomCallV2"
    for name in [name for name in node.attr if not name.startswith("_")]:
        del node.attr[name]
    node.attr["call_target_name"].s = target.encode()
    node.attr["backend_config"].s = b""
    node.attr["has_side_effect"].b = False
    node.attr["operand_dtypes"].list.type.append(kind)
    node.attr["result_dtypes"].list.type.append(kind)
    node.attr["result_shapes"].list.shape.append(shape)
    return True
