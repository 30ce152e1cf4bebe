"""Predictions of networks trained by gradient descent, from their kernels.

    gradient_descent_mse           any time, squared loss, in closed form
    gradient_descent               any differentiable loss, momentum: an ODE in function space
    gradient_descent_mse_ensemble  mean and covariance of infinitely many networks, from kernel_fn
    gp_inference                   the posterior of the NNGP, NTK or NTK-GP
    max_learning_rate              the largest stable step

Shapes: targets (n, c) go with kernels (n, n), since kernels of infinitely wide networks and traced
empirical ones are a multiple of the identity over the outputs, `trace_axes=(-1,)`. Kernels with all
outputs in pairs, (n, n, c, c), go with `trace_axes=()`.
"""

from tangents._inference.ensemble import gradient_descent_mse_ensemble
from tangents._inference.function_space import ODEState, gradient_descent
from tangents._inference.gaussian_process import Gaussian, gp_inference
from tangents._inference.gradient_flow import gradient_descent_mse
from tangents._inference.learning_rate import max_learning_rate

__all__ = [
    "Gaussian",
    "ODEState",
    "gp_inference",
    "gradient_descent",
    "gradient_descent_mse",
    "gradient_descent_mse_ensemble",
    "max_learning_rate",
]
