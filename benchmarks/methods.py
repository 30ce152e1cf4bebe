"""Every method on every network of `workloads.finite_structured`, in one process.

    python -m benchmarks.methods                        # AUTO beside the best single method
    python -m benchmarks.methods --only resnet/trace
    python -m benchmarks.methods --package neural_tangents --skip 0     # in the peer's environment

Methods take turns, and the smallest of the CPU times of a method counts. For this package the share
of AUTO's planning in tracing and compiling is printed too. Rows that only fit a memory budget are
left out: other methods would not fit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from benchmarks.protocol import Side
from benchmarks.worker import finish, timed
from benchmarks.workloads import finite_structured

NAMES = {0: "AUTO", 1: "Jacobian contraction", 2: "NTK-vector products", 3: "structured"}


def compile_method(row, trace: bool, side: Side, method: int) -> tuple[Callable, float]:
    """A compiled call, and CPU seconds of tracing and compiling it."""
    import jax

    f, params, x = finite_structured.make(row, side)
    kernel = side.nt.empirical_ntk_fn(
        f, trace_axes=(-1,) if trace else (), vmap_axes=0, implementation=method
    )
    started = time.process_time()
    compiled = jax.jit(lambda x, p: kernel(x, None, p)).lower(x, params).compile()
    return lambda: compiled(x, params), time.process_time() - started


def planning_share(row, trace: bool, side: Side) -> tuple[float, float]:
    """CPU seconds of AUTO's planning, and of tracing and compiling with it."""
    import jax

    from tangents._finite.methods import auto, structured_derivatives

    f, params, x = finite_structured.make(row, side)
    kernel = side.nt.empirical_ntk_fn(f, trace_axes=(-1,) if trace else (), vmap_axes=0)
    spent = []

    def clocked(function):
        def call(*args, **kwargs):
            started = time.process_time()
            result = function(*args, **kwargs)
            spent.append(time.process_time() - started)
            return result

        return call

    kept = auto.structured_derivatives.plans, auto.choose
    structured_derivatives.plans, auto.choose = (clocked(function) for function in kept)
    try:
        started = time.process_time()
        jax.jit(lambda x, p: kernel(x, None, p)).lower(x, params).compile()
        total = time.process_time() - started
    finally:
        structured_derivatives.plans, auto.choose = kept
    return sum(spent), total


def compare(row, trace: bool, side: Side, methods: list[int], rounds: int) -> None:
    form = "trace" if trace else "outputs"
    print(f"{row.name}/{form}", flush=True)
    compiled, times, calls = {}, {}, {}
    for method in methods:
        compiled[method], seconds = compile_method(row, trace, side, method)
        finish(compiled[method]())  # what the first call allocates is not the method's
        once = timed(compiled[method], 1)["cpu"]
        calls[method] = max(1, min(50, round(0.3 / max(once, 1e-6))))
        times[method] = [once]
        print(f"  {NAMES[method]}: compiled in {seconds:.2f} s, first {once:.4g} s", flush=True)
    for _ in range(rounds):
        for method in methods:
            if min(times[method]) > 5 * min(t for own in times.values() for t in own):
                continue  # not the best
            times[method].append(timed(compiled[method], calls[method])["cpu"])
    for method in methods:
        print(f"  {NAMES[method]}: {1e3 * min(times[method]):.4g} ms")
    single = [min(times[m]) for m in methods if m != 0]
    if 0 in methods and single:
        print(f"  AUTO / best: {min(times[0]) / min(single):.2f}")
    if side.ours:
        planning, total = planning_share(row, trace, side)
        print(f"  planning: {planning:.3f} of {total:.2f} s, {100 * planning / total:.1f} %")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Every method of the kernel, in one process")
    parser.add_argument("--only", default="", help="part of NETWORK/FORM")
    parser.add_argument("--package", default="tangents")
    parser.add_argument("--skip", type=int, nargs="*", default=[], help="methods left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    side = Side(given.package, given.quick)
    for row in finite_structured.ROWS:
        for trace in (True, False):
            wanted = row.trace if trace else row.outputs
            name = f"{row.name}/{'trace' if trace else 'outputs'}"
            if not wanted or row.budget or given.only not in name:
                continue
            compare(row, trace, side, [m for m in NAMES if m not in given.skip], given.rounds)


if __name__ == "__main__":
    main()
