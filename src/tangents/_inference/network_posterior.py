"""The NTK-GP posterior of a trained finite network: linearised Laplace in function space.

Around trained parameters w*, f(w, x) ≈ f(w*, x) + J(x)(w − w*). With the prior N(w*, v I) and
Gaussian noise of variance σ², the posterior over functions has (Khan et al. 2019; Immer et al.
2021)

    mean f(w*, x)    [ + Θ_x,X (Θ_XX + σ²/v I)⁻¹ (y − f(w*, X)) where targets are given ]
    covariance  v [Θ_xx' − Θ_x,X (Θ_XX + σ²/v I)⁻¹ Θ_X,x'].

Θ_XX is an operator throughout: memory grows with training outputs times test outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from tangents._core.precision import DEFAULT as HIGHEST
from tangents._core.typing import ApplyFn, Array, PyTree
from tangents._finite.operator import ntk_operator
from tangents._inference.gaussian_process import Gaussian
from tangents._inference.predictor import Recipe
from tangents._inference.solve import solve


@dataclass(frozen=True)
class NetworkPosterior:
    """Made by `network_posterior`; `predict(x)` gives means and variances."""

    f: ApplyFn
    params: PyTree
    x_train: PyTree
    operator: Any
    noise: float
    prior_variance: float
    mean_weights: Array | None
    solve_options: dict[str, Any]

    def recipe(self) -> Recipe:
        """How to make it again; what it has computed are the weights of its mean."""
        arguments = {name: getattr(self, name) for name in ("f", "params", "x_train")}
        arguments |= {"noise": self.noise, "prior_variance": self.prior_variance}
        return Recipe("network_posterior", arguments | self.solve_options, self.mean_weights)

    def resumed(self, computed: Array | None) -> NetworkPosterior:
        """Itself, with the mean of another."""
        return replace(self, mean_weights=computed)

    def predict(
        self, x: PyTree, *, full_covariance: bool = False, chunk: int = 64, noise: bool = False
    ) -> Gaussian:
        """Mean and variance of the outputs at `x`.

        Args:
            x: test inputs, examples on axis 0.
            full_covariance: whether to return the covariance of all outputs, (size, size), rather
                than variances in the shape of the outputs.
            chunk: test outputs whose systems are solved together.
            noise: whether to add σ², that is, predict targets.

        Returns:
            `Gaussian(mean, variances or covariance)`.
        """
        mean = self.f(self.params, x)
        cross = ntk_operator(self.f, self.params, self.x_train, x).materialise()
        if self.mean_weights is not None:
            shift = jnp.matmul(cross.T, self.mean_weights, precision=HIGHEST)
            mean = mean + shift.reshape(mean.shape)
        solved = [_solve(self, cross[:, i : i + chunk]) for i in range(0, cross.shape[1], chunk)]
        response = jnp.concatenate(solved, axis=1)
        prior = ntk_operator(self.f, self.params, x)
        extra = self.noise if noise else 0.0
        if full_covariance:
            left = prior.materialise() - jnp.matmul(cross.T, response, precision=HIGHEST)
            left = (left + left.T) / 2
            extra = extra * jnp.eye(left.shape[0], dtype=left.dtype)
            return Gaussian(mean, self.prior_variance * left + extra)
        left = prior.diagonal().reshape(-1) - jnp.sum(cross * response, axis=0)
        variance = self.prior_variance * jnp.maximum(left, 0) + extra
        return Gaussian(mean, variance.reshape(mean.shape))


def _solve(posterior: NetworkPosterior, right: Array) -> Array:
    ratio = posterior.noise / posterior.prior_variance
    options = posterior.solve_options
    return solve(posterior.operator, right, ratio, method="cg", **options).value


def network_posterior(
    f: ApplyFn,
    params: PyTree,
    x_train: PyTree,
    y_train: Array | None = None,
    *,
    noise: float,
    prior_variance: float = 1.0,
    **solve_options: Any,
) -> NetworkPosterior:
    r"""Uncertainty of a trained network from its tangent kernel, without the dense kernel.

    Args:
        f: `f(params, x)`, an array (n, ...).
        params: trained parameters.
        x_train: training inputs.
        y_train: targets in the shape of `f(params, x_train)`. If given, the mean is that of the
            linearised network fitted to them; otherwise it is the network's output.
        noise: σ², variance of the targets around the function.
        prior_variance: v, of each parameter around its trained value.
        **solve_options: of `tangents.solve` ('cg'): `rtol`, `preconditioner`, `progress`, ...

    Returns:
        `NetworkPosterior`, with `predict(x_test)`.

    Raises:
        SolveError: if the systems cannot be solved.

    Examples:
        >>> import jax.numpy as jnp, tangents
        >>> f = lambda w, x: jnp.tanh(x @ w)
        >>> x = jnp.linspace(-1, 1, 6)[:, None]
        >>> posterior = tangents.network_posterior(f, jnp.ones((1, 1)), x, noise=0.1)
        >>> posterior.predict(jnp.zeros((2, 1))).covariance.shape
        (2, 1)
    """
    if not noise > 0:
        raise ValueError(f"network_posterior: noise={noise} is a variance; it must be positive.")
    # One operator for all solves: it is linearised and compiled once.
    operator = ntk_operator(f, params, x_train)
    posterior = NetworkPosterior(
        f, params, x_train, operator, noise, prior_variance, None, solve_options
    )
    if y_train is None:
        return posterior
    outputs = f(params, x_train)
    if jnp.shape(y_train) != jnp.shape(outputs):
        raise ValueError(
            f"network_posterior: y_train has shape {jnp.shape(y_train)}, but f(params, x_train) "
            f"has shape {jnp.shape(outputs)}."
        )
    residual = (jnp.asarray(y_train, outputs.dtype) - outputs).reshape(-1)
    return replace(posterior, mean_weights=_solve(posterior, residual))
