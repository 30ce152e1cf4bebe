"""An exact Gaussian process with the NNGP of 4000 digits: fit of noise and scale, predictions.

Both sides get the kernel matrix and choose the noise and the scale of greatest marginal likelihood,
then predict means and variances of 200 test points. GPyTorch descends it by L-BFGS from its default
start, with Cholesky factors (its default at this size, conjugate gradients to a tolerance of 1,
does not give the same numbers); ours finds it in one eigendecomposition.
"""

from __future__ import annotations

from benchmarks.protocol import Case, Side, Target, Workload
from benchmarks.workloads.inference_solve import images, nngp


def problem(side: Side):
    """The kernel of training and test points, and targets of the training points; NumPy."""
    import numpy as np

    n, m = side.size(4000, 60), side.size(200, 5)
    x = images(n + m)
    # Noisy labels of no particular meaning, that the kernel explains in part.
    random = np.random.RandomState(1)
    y = np.sin(3 * x @ random.standard_normal(64)) + 0.3 * random.standard_normal(n + m)
    return nngp(x), y[:n].astype(np.float32), n


def ours(side: Side) -> Case:
    import jax.numpy as jnp

    kernel, y, n = problem(side)
    k, k_td = jnp.asarray(kernel[:n, :n]), jnp.asarray(kernel[n:, :n])
    prior, y = jnp.asarray(kernel.diagonal()[n:]), jnp.asarray(y)

    def run():
        fit = side.nt.fit_kernel_regression(k, y, "marginal-likelihood")
        mean, variance = fit.predict(k_td, prior)
        return mean, jnp.sqrt(variance)

    return Case(run=run)


def gpytorch(side: Side) -> Case:
    import torch

    gp = side.nt
    kernel, y, n = problem(side)
    kernel, y = torch.from_numpy(kernel), torch.from_numpy(y)
    place = torch.arange(len(kernel), dtype=torch.float32)[:, None]

    class Given(gp.kernels.Kernel):
        """Entries of a matrix; the inputs are its indices, which are contiguous."""

        def forward(self, x1, x2, diag=False, **_):
            rows, columns = (slice(int(x[0, 0]), int(x[-1, 0]) + 1) for x in (x1, x2))
            block = kernel[rows, columns]
            return block.diagonal() if diag else block

    class Model(gp.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(place[:n], y, likelihood)
            self.mean = gp.means.ZeroMean()
            self.kernel = gp.kernels.ScaleKernel(Given())

        def forward(self, x):
            return gp.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    def run():
        likelihood = gp.likelihoods.GaussianLikelihood()
        model = Model(likelihood)
        evidence = gp.mlls.ExactMarginalLogLikelihood(likelihood, model)
        weights = model.parameters()
        optimiser = torch.optim.LBFGS(weights, max_iter=20, line_search_fn="strong_wolfe")

        def closure():
            optimiser.zero_grad()
            loss = -evidence(model(place[:n]), y)
            loss.backward()
            return loss

        with gp.settings.fast_computations(False, False, False):
            optimiser.step(closure)
            model.eval()
            likelihood.eval()
            with torch.no_grad():
                posterior = model(place[n:])
                return posterior.mean, posterior.variance.sqrt()

    return Case(run=run)


WORKLOADS = [
    Workload(
        "gp/fit_and_predict/4000",
        ours,
        peer="gpytorch",
        peer_build=gpytorch,
        targets=(Target("speedup", 1.0),),
        rtol=2e-2,
        memory=False,
    )
]
