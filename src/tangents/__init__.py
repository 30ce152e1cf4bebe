"""Neural tangent kernels of finite and infinitely wide networks, in JAX.

A kernel is a linear operator; a dense matrix is what you get when you materialise it.
"""

# Finite networks: kernels of a parameter Jacobian.
from tangents import predict, stax
from tangents._finite.functions import empirical_kernel_fn, empirical_nngp_fn, empirical_ntk_fn
from tangents._finite.implementation import NtkImplementation
from tangents._finite.linearization import linearize, taylor_expand
from tangents._finite.operator import NTKOperator, ntk_operator
from tangents._finite.vector_product import empirical_ntk_vp_fn

# Inference: linear systems, spectra, regression, files.
from tangents._inference.alignment import (
    kernel_alignment,
    kernel_distance,
    kernel_velocity,
    target_alignment,
    task_model_alignment,
)
from tangents._inference.calibration import (
    Calibration,
    ClassCalibration,
    calibration,
    class_calibration,
    class_probabilities,
)
from tangents._inference.network_posterior import NetworkPosterior, network_posterior
from tangents._inference.regression import (
    KernelRegression,
    fit_kernel_regression,
    leave_one_out,
    log_marginal_likelihood,
)
from tangents._inference.saving import load, save
from tangents._inference.solution import Solution, SolveError
from tangents._inference.solve import solve
from tangents._inference.spectrum import (
    Spectrum,
    condition_number,
    effective_dimension,
    spectrum,
)

# Infinitely wide networks (layers are in `tangents.stax`).
from tangents._infinite.kernel import Kernel

# Scale: tiles, devices, samples.
from tangents._scale.batch import batch
from tangents._scale.monte_carlo import MonteCarloEstimate, monte_carlo_kernel_fn
from tangents._version import __version__

# Models of any framework.
from tangents.frontends import from_model

__all__ = [
    "Calibration",
    "ClassCalibration",
    "Kernel",
    "KernelRegression",
    "MonteCarloEstimate",
    "NTKOperator",
    "NetworkPosterior",
    "NtkImplementation",
    "Solution",
    "SolveError",
    "Spectrum",
    "__version__",
    "batch",
    "calibration",
    "class_calibration",
    "class_probabilities",
    "condition_number",
    "effective_dimension",
    "empirical_kernel_fn",
    "empirical_nngp_fn",
    "empirical_ntk_fn",
    "empirical_ntk_vp_fn",
    "fit_kernel_regression",
    "from_model",
    "kernel_alignment",
    "kernel_distance",
    "kernel_velocity",
    "leave_one_out",
    "linearize",
    "load",
    "log_marginal_likelihood",
    "monte_carlo_kernel_fn",
    "network_posterior",
    "ntk_operator",
    "predict",
    "save",
    "solve",
    "spectrum",
    "stax",
    "target_alignment",
    "task_model_alignment",
    "taylor_expand",
]
