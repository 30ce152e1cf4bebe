"""Import time of the package on top of JAX.

The peer's TensorFlow and tf2jax are empty modules here: with the real ones it takes seconds more.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.protocol import Case, Side, Target, Workload

PROGRAM = """
import time
import jax, jax.numpy
wall, cpu = time.perf_counter(), time.process_time()
import {package}
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def build(side: Side) -> Case:
    def measure() -> tuple[float, float]:
        program = PROGRAM.format(package=side.package)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        wall, cpu = done.stdout.split()[-2:]
        return float(wall), float(cpu)

    return Case(run=list, measure=measure)


WORKLOADS = [Workload("import", build, targets=(Target("seconds", 0.3),), memory=False)]
