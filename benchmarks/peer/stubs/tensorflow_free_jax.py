"""Puts an empty module in the place of jax.experimental.jax2tf, whose own import needs TensorFlow.

A line in the environment's `stubs.pth` imports this at start-up.
"""

import sys
from types import ModuleType

sys.modules.setdefault("jax.experimental.jax2tf", ModuleType("jax.experimental.jax2tf"))
