"""Bayesian regression with an infinitely wide network, on diabetes progression.

The NNGP kernel is the prior of an infinitely wide fully-connected network over functions; Gaussian
process inference with it gives predictions with error bars. Prints the error of the mean, the share
of test patients within the 95 % band, and the error of predicting the mean. Needs
`pip install "tangents[demo]"`.
"""

import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_diabetes

import tangents
from tangents import predict, stax


def main():
    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x = jnp.asarray((x / x.std(0))[order], jnp.float32)
    y = jnp.asarray(((y - y.mean()) / y.std())[order, None], jnp.float32)
    train, test = slice(0, 350), slice(350, None)

    *_, kernel_fn = stax.serial(
        stax.Dense(512, W_std=1.0, b_std=0.3), stax.Erf(), stax.Dense(1, W_std=1.0, b_std=0.3)
    )
    noise = 0.5
    k_train = kernel_fn(x[train], None, "nngp")
    predict_fn = predict.gp_inference(
        k_train, y[train], diag_reg=noise, diag_reg_absolute_scale=True
    )
    posterior = predict_fn(
        "nngp",
        k_test_train=kernel_fn(x[test], x[train], "nngp"),
        k_test_test=kernel_fn(x[test], None, "nngp"),
    )
    deviation = jnp.sqrt(jnp.diag(posterior.covariance) + noise)[:, None]
    error = posterior.mean - y[test]
    print(f"tangents {tangents.__version__}: {len(x)} patients, {x.shape[1]} measurements each")
    print(f"root mean square error   {jnp.sqrt(jnp.mean(error**2)):.3f}")
    print(f"of predicting the mean   {jnp.sqrt(jnp.mean(y[test] ** 2)):.3f}")
    print(f"within the 95 % band     {jnp.mean(jnp.abs(error) < 1.96 * deviation):.3f}")


if __name__ == "__main__":
    main()
