"""Neural tangent kernels of finite and infinitely wide networks, in JAX.

A kernel is a linear operator; a dense matrix is what you get when you materialise it.
"""

# Finite networks: kernels of a parameter Jacobian.
from tangents._finite.functions import empirical_kernel_fn, empirical_nngp_fn, empirical_ntk_fn
from tangents._finite.implementation import NtkImplementation
from tangents._finite.linearization import linearize, taylor_expand
from tangents._finite.operator import NTKOperator, ntk_operator
from tangents._finite.vector_product import empirical_ntk_vp_fn

# Inference: linear systems, spectra, regression.
from tangents._inference.solution import Solution, SolveError
from tangents._inference.solve import solve
from tangents._version import __version__

# Models of any framework.
from tangents.frontends import from_model

__all__ = [
    "NTKOperator",
    "NtkImplementation",
    "Solution",
    "SolveError",
    "__version__",
    "empirical_kernel_fn",
    "empirical_nngp_fn",
    "empirical_ntk_fn",
    "empirical_ntk_vp_fn",
    "from_model",
    "linearize",
    "ntk_operator",
    "solve",
    "taylor_expand",
]
