"""Tests that need TensorFlow run where it is installed (`make test-tensorflow`)."""

import importlib.util
import os

import pytest

HAS_TENSORFLOW = all(importlib.util.find_spec(name) for name in ("tensorflow", "keras"))

collect_ignore_glob = [] if HAS_TENSORFLOW else ["test_tensorflow_*.py"]

if HAS_TENSORFLOW:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")


@pytest.fixture
def floating(x64: bool) -> str:
    """The element type of this run's models."""
    return "float64" if x64 else "float32"
