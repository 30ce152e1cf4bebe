"""Results and predictors in files."""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tangents

Triple = collections.namedtuple("Triple", "nngp ntk other")


@pytest.fixture(params=["result.npz", "result.zarr"])
def path(request, tmp_path):
    if request.param.endswith("zarr"):
        pytest.importorskip("zarr")
    return tmp_path / request.param


def test_saved_and_loaded(kernel, path):
    k, _, y = kernel
    fit = tangents.fit_kernel_regression(k, y)
    state = tangents.predict.ODEState(y, None)
    gaussian = tangents.predict.Gaussian(y, k)
    content = {
        "fit": fit,
        "spectrum": tangents.spectrum(k, 3),
        "solution": tangents.solve(k, y, 0.1),
        "named": Triple(k, None, (1, 2.5, float("inf"))),
        "list": [state, gaussian, "text", True],
        "half": k.astype(jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.ones(()),
    }
    tangents.save(path, content)
    loaded = tangents.load(path)
    for a, b in zip(jax.tree.leaves(content), jax.tree.leaves(loaded), strict=True):
        if isinstance(a, jax.Array):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b
    assert type(loaded["list"][1]) is tangents.predict.Gaussian
    assert loaded["named"]._fields == ("nngp", "ntk", "other")
    np.testing.assert_array_equal(loaded["fit"].predict(k), fit.predict(k))
    # Another result takes its place.
    tangents.save(path, [y])
    np.testing.assert_array_equal(tangents.load(path)[0], y)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_failed_save_leaves_what_was_there(kernel, path, monkeypatch):
    k, _, _ = kernel
    with pytest.raises(TypeError, match=r"result.f is a function; only data"):
        tangents.save(path, {"f": fitted})
    assert not list(path.parent.iterdir())
    tangents.save(path, {"k": k})

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if path.suffix == ".zarr":
        import zarr

        monkeypatch.setattr(zarr.Group, "create_array", interrupted)
    else:
        monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tangents.save(path, {"k": 2 * k})
    monkeypatch.undo()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    np.testing.assert_array_equal(tangents.load(path)["k"], k)


def test_files_hold_data_only(kernel, tmp_path):
    k, _, _ = kernel
    path = tmp_path / "result.npz"
    tangents.save(path, {"k": k})
    with np.load(path, allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)
    np.savez(path, a=np.ones(2))
    with pytest.raises(ValueError, match=r"was not written by tangents.save"):
        tangents.load(path)
    header = np.frombuffer(b'{"format": 99, "tangents": "9", "content": null}', np.uint8)
    np.savez(path, header=header)
    with pytest.raises(ValueError, match="format 99"):
        tangents.load(path)


def test_foreign_zarr(tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.open_group(tmp_path / "new.zarr", mode="w", zarr_format=3)
    # Version 2 could hold pickles: it is not even opened.
    zarr.open_group(tmp_path / "old.zarr", mode="w", zarr_format=2).attrs["tangents"] = {}
    (tmp_path / "none.zarr").mkdir()
    for name in ("new", "old", "none"):
        with pytest.raises(ValueError, match=r"was not written by tangents.save"):
            tangents.load(tmp_path / f"{name}.zarr")


def test_saved_kernel(path):
    stax = pytest.importorskip("tangents.stax")
    k = stax.serial(stax.Dense(1), stax.Relu())[2](jnp.ones((3, 2)), None)
    tangents.save(path, k)
    loaded = tangents.load(path)
    assert type(loaded) is type(k)
    for a, b in zip(k.astuple(), loaded.astuple(), strict=True):
        if isinstance(a, jax.Array):
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


def network(w, x):
    return jnp.tanh(x @ w[0]) @ w[1]


def distance_kernel(x1, x2, get, **_):
    x2 = x1 if x2 is None else x2
    squared = jnp.sum((x1[:, None] - x2[None]) ** 2, axis=-1)
    kernels = {"nngp": jnp.exp(-squared), "ntk": 2 * jnp.exp(-squared / 2)}
    return kernels[get] if isinstance(get, str) else Triple(**kernels, other=None)


def half_squares(fx, y):
    return 0.5 * jnp.mean((fx - y) ** 2)


def fitted(name, kernel) -> Any:
    """A predictor, the functions it was made with, and what to ask of it."""
    k, _, y = kernel
    both = Triple(k, 2 * k, None)
    x, w = k[:, :3], (jnp.ones((3, 4)) / 3, jnp.ones((4, 2)) / 5)
    k_td, test = k[:4], x[:4]
    match name:
        case "mse":
            made = tangents.predict.gradient_descent_mse(k, y, 2.0, diag_reg=1e-3)
            return made, {}, lambda p: (p(1.5, 0.0, 0.0, k_td), p(None, 0.0, 0.0, k_td))
        case "singular":
            made = tangents.predict.gradient_descent_mse(jnp.ones_like(k), y)
            return made, {}, lambda p: p(None)
        case "gp":
            made = tangents.predict.gp_inference(both, y, 1e-3)
            return made, {}, lambda p: p(None, Triple(k_td, 2 * k_td, None), k[:4, :4])
        case "flow":
            made = tangents.predict.gradient_descent(half_squares, k, y, momentum=0.9)
            return made, {"loss": half_squares}, lambda p: p(2.0)
        case "ensemble":
            made = tangents.predict.gradient_descent_mse_ensemble(distance_kernel, x, y)
            ask = lambda p: (p(1.0, test, compute_cov=True), p(None, test))
            return made, {"kernel_fn": distance_kernel}, ask
        case _:
            made = tangents.network_posterior(network, w, x, y, noise=0.1, rtol=1e-4)
            return made, {"f": network}, lambda p: p.predict(test)


PREDICTORS = ["mse", "singular", "gp", "flow", "ensemble", "posterior"]


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("name", PREDICTORS)
def test_predictors_saved_and_loaded(name, used, kernel, tmp_path):
    made, functions, ask = fitted(name, kernel)
    path = tmp_path / "predictor.npz"
    if used:
        ask(made)
    tangents.save(path, {"predictor": made})
    loaded = tangents.load(path, **functions)["predictor"]
    assert type(loaded) is type(made)
    for a, b in zip(jax.tree.leaves(ask(made)), jax.tree.leaves(ask(loaded)), strict=True):
        np.testing.assert_array_equal(a, b)
    if functions:
        with pytest.raises(ValueError, match=rf"without {next(iter(functions))}, which is not"):
            tangents.load(path)
    with pytest.raises(ValueError, match="needs no other"):
        tangents.load(path, other=network, **functions)


def test_a_loaded_predictor_goes_on_with_its_factors(kernel, tmp_path, monkeypatch, x64):
    from tangents._inference import lapack

    made, _, ask = fitted("mse", kernel)
    ask(made)
    path = tmp_path / "predictor.npz"
    tangents.save(path, made)
    loaded = tangents.load(path)

    def again(*_):
        raise AssertionError("factored again")

    monkeypatch.setattr(lapack, "eigh", again)
    if x64:
        # Where JAX has no float64, a factor in float64 is not loaded: it would be rounded.
        monkeypatch.setattr(lapack, "cholesky", again)
    ask(loaded)
    with pytest.raises(AssertionError, match="factored again"):
        ask(fitted("mse", kernel)[0])


def test_a_posterior_whose_parameters_are_no_data(kernel, tmp_path):
    # Parameters in a class of the user's are not stored: they are passed again.
    made, functions, ask = fitted("posterior", kernel)

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Weights:
        first: jax.Array
        second: jax.Array

        def __getitem__(self, i):
            return (self.first, self.second)[i]

    weights = Weights(*made.params)
    same = tangents.network_posterior(network, weights, made.x_train, noise=0.1, rtol=1e-4)
    path = tmp_path / "posterior.npz"
    tangents.save(path, same)
    with pytest.raises(ValueError, match=r"load\(path, params=\.\.\.\)"):
        tangents.load(path, **functions)
    loaded = tangents.load(path, params=weights, **functions)
    np.testing.assert_array_equal(ask(loaded).covariance, ask(same).covariance)
