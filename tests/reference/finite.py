"""The NTK of a finite network in a few obvious lines: full Jacobians, one einsum."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def jacobian(f, params, x):
    """d f(params, x) / d params for a real-valued array output: shape output + (parameters,)."""
    flat, unravel = ravel_pytree(params)
    return jax.jit(jax.jacobian(lambda p: f(unravel(p), x)))(flat)


def ntk(f, params, x1, x2=None, trace_axes=(-1,), diagonal_axes=()):
    """Kernel in layout (n1, n2, k1, k2, ..): trace axes averaged, diagonal axes kept once."""
    j1 = jacobian(f, params, x1)
    j2 = j1 if x2 is None else jacobian(f, params, x2)
    return reduce_pairs(jnp.tensordot(j1, j2, (-1, -1)), trace_axes, diagonal_axes)


def nngp(f, params, x1, x2=None, trace_axes=(-1,), diagonal_axes=()):
    """The Gram matrix of outputs in the same layout."""
    y1, y2 = f(params, x1), f(params, x1 if x2 is None else x2)
    return reduce_pairs(jnp.tensordot(y1, y2, 0), trace_axes, diagonal_axes)


def reduce_pairs(full, trace_axes, diagonal_axes):
    """From shape1 + shape2 to the kernel's layout, one axis at a time."""
    ndim = full.ndim // 2
    full = np.asarray(full)
    as_tuple = lambda axes: (axes,) if isinstance(axes, int) else tuple(axes)
    trace = {a % ndim for a in as_tuple(trace_axes)}
    diagonal = {a % ndim for a in as_tuple(diagonal_axes)}
    # (d0.., d0'..) -> (d0, d0', d1, d1', ..)
    kernel = full.transpose([i // 2 + (i % 2) * ndim for i in range(2 * ndim)])
    position = 0
    for axis in range(ndim):
        if axis in trace:
            kernel = kernel.trace(axis1=position, axis2=position + 1) / kernel.shape[position]
        elif axis in diagonal:
            kernel = np.moveaxis(kernel.diagonal(axis1=position, axis2=position + 1), -1, position)
            position += 1
        else:
            position += 2
    return kernel
