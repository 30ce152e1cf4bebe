"""Predictions of `predict` from dense kernels and from kernel functions of wide networks.

Both sides call it as a user does: a fresh predictor for each run, except where the row says
`again`, which times another call of a predictor that has its factorisation already.
"""

from __future__ import annotations

from benchmarks.protocol import Case, Side, Target, Workload


def problem(n: int, m: int, c: int = 10):
    """A kernel of n training and m test points, targets; float32 from NumPy."""
    import jax.numpy as jnp
    import numpy as np

    random = np.random.RandomState(0)
    x = random.standard_normal((n + m, 20))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosine = np.clip(x @ x.T, -1, 1)
    kernel = (np.sqrt(1 - cosine**2) + (np.pi - np.arccos(cosine)) * cosine) / np.pi
    kernel[np.arange(n), np.arange(n)] += 1e-2
    array = lambda a: jnp.asarray(a.astype(np.float32))
    y = random.standard_normal((n, c))
    return array(kernel[:n, :n]), array(kernel[n:, :n]), array(y)


def mse(form: str, bound: float):
    def build(side: Side) -> Case:
        import numpy as np

        predict = side.nt.predict
        k, k_td, y = problem(side.size(2000, 30), side.size(200, 5))
        times = {"three_times": np.array([1e2, 1e4, 1e6], np.float32), "infinity": None}
        t = times.get(form, np.array([3e2, 3e4, 3e6], np.float32))
        if form == "again":
            predict_fn = predict.gradient_descent_mse(k, y)
            return Case(run=lambda: predict_fn(t, 0.0, 0.0, k_td))
        return Case(run=lambda: predict.gradient_descent_mse(k, y)(t, 0.0, 0.0, k_td))

    return Workload(f"predict/mse/{form}", build, targets=(Target("speedup", bound),), rtol=1e-2)


def ensemble(form: str):
    def build(side: Side) -> Case:
        import jax.numpy as jnp
        import numpy as np

        stax = side.stax
        layers = [stax.Dense(1, 1.5, 0.1), stax.Relu()] * 3 + [stax.Dense(1, 1.5, 0.1)]
        kernel_fn = stax.serial(*layers)[2]
        random = np.random.RandomState(0)
        array = lambda *shape: jnp.asarray(random.standard_normal(shape).astype(np.float32))
        n, m = side.size(1000, 20), side.size(250, 5)
        x, xt, y = array(n, 784), array(m, 784), array(n, 10)
        t = None if form == "infinity" else np.float32(1e3)

        def run():
            make = side.nt.predict.gradient_descent_mse_ensemble
            got = make(kernel_fn, x, y, diag_reg=1e-3)(t, xt, None, True)
            # Plain tuples: the named ones have classes of each side.
            return tuple(tuple(part) for part in got)

        return Case(run=run)

    return Workload(f"predict/ensemble/{form}", build, targets=(Target("speedup", 2.0),), rtol=1e-2)


WORKLOADS = [
    mse("three_times", 1.0),
    mse("again", 1.0),
    mse("infinity", 1.0),
    ensemble("infinity"),
    ensemble("finite_time"),
]
