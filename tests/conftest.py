"""Precision of a test run: TANGENTS_TEST_X64=1 (default) or 0; promotion is strict in both."""

import os
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

X64 = os.environ.get("TANGENTS_TEST_X64", "1") == "1"
jax.config.update("jax_enable_x64", X64)
jax.config.update("jax_numpy_dtype_promotion", "strict")

settings.register_profile(
    "tangents",
    deadline=None,
    max_examples=int(os.environ.get("TANGENTS_TEST_EXAMPLES", "20")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    derandomize=True,
)
settings.load_profile("tangents")


def pytest_configure(config):
    # Reminders the contract wants at every call or init, whatever the network; shown to be there by
    # infinite/test_contract.py.
    config.addinivalue_line("filterwarnings", "ignore:FanIn layers assume")
    config.addinivalue_line("filterwarnings", "ignore:GlobalSelfAttention. with linear_scaling")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Compiled programs are let go before the process runs out of memory maps (65530) and crashes.

    All slow tests in one process take more.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def rtol() -> float:
    """Bound for a fast path against the slow reference in the precision of this run."""
    return 1e-10 if X64 else 2e-4


@pytest.fixture
def x64() -> bool:
    return X64
