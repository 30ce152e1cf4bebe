"""Neural tangent kernels of finite and infinitely wide networks, in JAX.

A kernel is a linear operator; a dense matrix is what you get when you materialise it.
"""

from tangents._version import __version__

__all__ = ["__version__"]
