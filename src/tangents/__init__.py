"""Neural tangent kernels of finite and infinitely wide networks, in JAX.

A kernel is a linear operator; a dense matrix is what you get when you materialise it.
"""

# Finite networks: kernels of a parameter Jacobian.
from tangents._finite.functions import empirical_kernel_fn, empirical_nngp_fn, empirical_ntk_fn
from tangents._finite.implementation import NtkImplementation
from tangents._finite.linearization import linearize, taylor_expand
from tangents._finite.operator import NTKOperator, ntk_operator
from tangents._finite.vector_product import empirical_ntk_vp_fn
from tangents._version import __version__

__all__ = [
    "NTKOperator",
    "NtkImplementation",
    "__version__",
    "empirical_kernel_fn",
    "empirical_nngp_fn",
    "empirical_ntk_fn",
    "empirical_ntk_vp_fn",
    "linearize",
    "ntk_operator",
    "taylor_expand",
]
