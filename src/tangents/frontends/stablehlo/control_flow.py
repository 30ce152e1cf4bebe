"""Branches and loops.

A loop whose condition depends on counters with known values (not on data) runs a known number of
times: it becomes `lax.scan`, which has a reverse mode. What the body hands through unchanged is
closed over; counters become inputs of each step; rows read from a fixed array at a counter are
sliced beforehand, and rows written at a counter are stacked afterwards, so that the loop looks like
one written in JAX. A loop that also asks about data, but counts to a known most (the
`maximum_iterations` of `tf.while_loop`), scans that many steps and does nothing after it has ended.
Any other loop becomes `lax.while_loop`, which has a forward mode only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from tangents.frontends.stablehlo.evaluation import (
    Machine,
    Value,
    can_fold,
    describe,
    is_known,
    rule,
)
from tangents.frontends.stablehlo.forward_only import forward_only
from tangents.frontends.stablehlo.program import Operation, Region, free, restricted

_MOST_STEPS = 1_000_000  # a loop that is simulated longer than this is left to run as `while`


@rule("if")
def if_(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """One of two regions."""
    (predicate,) = operands
    on_true, on_false = op.regions
    outer = machine.outer
    if is_known(predicate):
        return machine.run(on_true if predicate else on_false, [], outer)
    return list(
        lax.cond(
            predicate,
            lambda: _as_jax(machine.run(on_true, [], outer)),
            lambda: _as_jax(machine.run(on_false, [], outer)),
        )
    )


@rule("case")
def case(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """One of several regions; an index out of range takes the last one."""
    (index,) = operands
    last = len(op.regions) - 1
    outer = machine.outer
    if is_known(index):
        chosen = int(index) if 0 <= int(index) <= last else last
        return machine.run(op.regions[chosen], [], outer)
    inside = jnp.logical_and(index >= 0, index <= last)
    branches = [lambda r=region: _as_jax(machine.run(r, [], outer)) for region in op.regions]
    return list(lax.switch(jnp.where(inside, index, jnp.full_like(index, last)), branches))


@rule("while")
def while_(op: Operation, operands: list[Value], machine: Machine) -> list[Value]:
    """A loop: `scan` where the number of steps is known, `while_loop` otherwise."""
    condition, body = op.regions
    outer = machine.outer
    loop = _Loop.of(condition, body, operands, machine)
    if loop is not None:
        loop.find_reads()
        loop.find_writes()
        return loop.scan(machine)
    for part in _conjuncts(condition):
        loop = _Loop.of(part, body, operands, machine)
        if loop is not None:
            return loop.scan_until(condition, machine)
    message = (
        f"the number of steps of the loop {describe(op)} depends on data, so it has no reverse "
        "mode, and no tangent kernel. Give the loop a most (maximum_iterations= of tf.while_loop, "
        "or a tf.range of known length), or differentiate in forward mode (jax.jvp, jax.jacfwd)."
    )

    # JAX meets the mark behind the loop first, a walk over its steps the one inside.
    def marked(values: list[Any]) -> list[Any]:
        return [forward_only(value, message) for value in values]

    results = lax.while_loop(
        lambda carried: jnp.asarray(machine.run(condition, carried, outer)[0]),
        lambda carried: tuple(marked(_as_jax(machine.run(body, carried, outer)))),
        tuple(_as_jax(operands)),
    )
    return marked(list(results))


def _conjuncts(condition: Region) -> list[Region]:
    """The conditions of which a loop's condition is the conjunction; none if it is not one."""
    by_result = {result: op for op in condition.operations for result in op.results}
    found, waiting = [], list(condition.returns)
    while waiting:
        value = waiting.pop()
        op = by_result.get(value)
        if op is not None and op.name == "stablehlo.and":
            waiting += op.operands
        elif (value,) != condition.returns:
            found.append(
                Region(condition.arguments, condition.types, condition.operations, (value,))
            )
    return found


def _as_jax(values: list[Value]) -> list[Any]:
    return [jnp.asarray(value) for value in values]


@dataclass
class _Loop:
    """A loop with a known number of steps; positions are those of the carried values."""

    body: Region
    initial: list[Value]
    outer: dict[int, Value]
    invariants: set[int]
    """Positions that the body hands through unchanged."""
    counters: dict[int, np.ndarray]
    """Position → its value before each step, and after the last."""
    sequences: dict[int, np.ndarray]
    """Other values of the body that depend on counters alone → their value in each step."""
    steps: int
    reads: dict[int, Value] = field(default_factory=dict)
    """Result of a slice in the body → the slices of all steps, stacked."""
    writes: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    """Position of an array → the value written as one of its rows, and the row in each step."""

    @classmethod
    def of(
        cls, condition: Region, body: Region, initial: list[Value], machine: Machine
    ) -> _Loop | None:
        """The loop, or None where the number of steps depends on data."""
        position = {value: i for i, value in enumerate(body.arguments)}
        invariants = {i for i, value in enumerate(body.returns) if position.get(value) == i}
        asking = {value: i for i, value in enumerate(condition.arguments)}
        _, needed = restricted(condition, condition.returns)
        counting = _closure(body, {asking[value] for value in needed if value in asking})
        if not all(is_known(initial[i]) for i in counting):
            return None
        counting |= _idle_counters(body, initial)
        fixed = {body.arguments[i]: initial[i] for i in invariants if is_known(initial[i])}
        outer = dict(machine.outer)
        constants = {value for value in outer if is_known(outer[value])}
        known = {body.arguments[i] for i in counting} | set(fixed) | constants
        simulated = _simulate(
            condition,
            body,
            initial,
            sorted(counting - invariants),
            _slice_positions(body, known),
            outer,
        )
        if simulated is None:
            return None
        counters, sequences, steps = simulated
        return cls(body, initial, outer, invariants, counters, sequences, steps)

    def find_reads(self) -> None:
        """Rows of an array from outside the loop, at a known position in each step."""
        if self.steps < 2:
            return
        fixed = {self.body.arguments[i]: self.initial[i] for i in self.invariants}
        fixed.update((value, self.outer[value]) for value in self.outer)
        for op in self.body.operations:
            if op.name != "stablehlo.dynamic_slice" or op.operands[0] not in fixed:
                continue
            array = fixed[op.operands[0]]
            rows = self.rows(op.operands[1:], tuple(op.attributes["slice_sizes"]), array.shape)
            if rows is not None:
                self.reads[op.results[0]] = jnp.asarray(_take(array, rows))[:, None]

    def find_writes(self) -> None:
        """Carried arrays of which each step only replaces a row of its own."""
        if self.steps < 2:
            return
        for i, value in enumerate(self.body.arguments):
            users = [op for op in self.body.operations if value in _reads(op)]
            if i in self.invariants or len(users) != 1:
                continue
            (op,) = users
            if op.name != "stablehlo.dynamic_update_slice" or op.operands[0] != value:
                continue
            if op.operands.count(value) > 1 or op.results[0] != self.body.returns[i]:
                continue
            others = [o for o in self.body.operations if op.results[0] in _reads(o)]
            if others or self.body.returns.count(op.results[0]) > 1:
                continue
            shape = op.types[0].shape
            rows = self.rows(op.operands[2:], (1, *shape[1:]), shape)
            # The update must be one row; a write of more shows in its own type.
            if rows is not None and len(set(rows.tolist())) == self.steps and self.is_row(op):
                self.writes[i] = (op.operands[1], rows)

    def is_row(self, op: Operation) -> bool:
        """Whether an update is a single row of the array."""
        kinds = dict(zip(self.body.arguments, self.body.types, strict=True))
        for other in self.body.operations:
            kinds.update(zip(other.results, other.types, strict=True))
        shape = kinds[op.operands[1]].shape if op.operands[1] in kinds else ()
        return shape == (1, *op.types[0].shape[1:])

    def rows(
        self, starts: tuple[int, ...], sizes: tuple[Any, ...], shape: tuple[int, ...]
    ) -> np.ndarray | None:
        """The row of each step, if the slices are whole rows at known places."""
        if not shape or sizes[0] != 1 or tuple(int(s) for s in sizes[1:]) != shape[1:]:
            return None
        if any(start not in self.sequences for start in starts):
            return None
        if any(self.sequences[start].any() for start in starts[1:]):
            return None
        rows = self.sequences[starts[0]]
        return np.clip(rows, 0, shape[0] - 1) if self.steps else None

    def scan(self, machine: Machine) -> list[Value]:
        """What the loop carries after its last step."""
        loose = set(range(len(self.initial))) - self.invariants - set(self.counters)
        carried = sorted(loose - set(self.writes))
        final = list(self.initial)
        for i, values in self.counters.items():
            final[i] = values[-1]
        returns = tuple(self.body.returns[i] for i in carried)
        written = tuple(value for value, _ in self.writes.values())
        body = Region(self.body.arguments, self.body.types, self.body.operations, returns + written)
        # Only what is still asked for: the writes, and the positions of the reads, are not.
        body, _ = restricted(body, body.returns, known=self.reads)
        used = {i for op in body.operations for i in _reads(op)} | set(body.returns)

        def step(state: list[Value], inputs: tuple) -> tuple[list[Value], list[Value]]:
            counters, rows = inputs
            values = list(self.initial)
            for i, value in {**dict(zip(carried, state, strict=True)), **counters}.items():
                values[i] = value
            results = _as_jax(machine.run(body, values, self.outer, known=rows))
            return results[: len(carried)], results[len(carried) :]

        state = _as_jax([self.initial[i] for i in carried])
        counters = {
            i: values[:-1] for i, values in self.counters.items() if body.arguments[i] in used
        }
        if self.steps == 1:
            first = {i: np.asarray(values[0]) for i, values in counters.items()}
            state, _ = step(state, (first, {}))
        elif self.steps:
            state, rows = lax.scan(step, state, (counters, self.reads), length=self.steps)
            for (i, (_, places)), updates in zip(self.writes.items(), rows, strict=True):
                final[i] = _put(self.initial[i], places, updates[:, 0])
        for i, value in zip(carried, state, strict=True):
            final[i] = value
        return final

    def scan_until(self, condition: Region, machine: Machine) -> list[Value]:
        """What the loop carries when `condition` first fails, which is after `steps` at the latest.

        The steps after that hand on what there is.
        """
        carried = sorted(set(range(len(self.initial))) - self.invariants - set(self.counters))
        body, _ = restricted(self.body, tuple(self.body.returns[i] for i in carried))

        def step(state: tuple, counters: dict[int, Any]) -> tuple[tuple, None]:
            goes_on, taken, before = state
            values = list(self.initial)
            for i, value in {**dict(zip(carried, before, strict=True)), **counters}.items():
                values[i] = value
            (asked,) = _as_jax(machine.run(condition, values, self.outer))
            goes_on = jnp.logical_and(goes_on, asked)
            after = lax.cond(
                goes_on, lambda: _as_jax(machine.run(body, values, self.outer)), lambda: before
            )
            return (goes_on, taken + goes_on.astype(taken.dtype), after), None

        first = (jnp.asarray(True), jnp.asarray(0, jnp.int32))
        state = (*first, _as_jax([self.initial[i] for i in carried]))
        inputs = {i: values[:-1] for i, values in self.counters.items()}
        (_, taken, state), _ = lax.scan(step, state, inputs, length=self.steps)
        final = list(self.initial)
        for i, values in self.counters.items():
            final[i] = jnp.asarray(values)[taken]
        for i, value in zip(carried, state, strict=True):
            final[i] = value
        return final


def _reads(op: Operation) -> set[int]:
    """The values that an operation reads, those of its regions too."""
    reads = set(op.operands)
    for inner in op.regions:
        reads |= free(inner)
    return reads


def _closure(body: Region, positions: set[int]) -> set[int]:
    """Positions that these depend on from one step to the next."""
    position = {value: i for i, value in enumerate(body.arguments)}
    found: set[int] = set()
    waiting = set(positions)
    while waiting:
        i = waiting.pop()
        found.add(i)
        _, needed = restricted(body, (body.returns[i],))
        waiting |= {position[value] for value in needed if value in position} - found
    return found


def _idle_counters(body: Region, initial: list[Value]) -> set[int]:
    """Scalars that count along without being asked whether to go on."""
    scalars = {
        i
        for i, kind in enumerate(body.types)
        if kind.shape == () and kind.dtype.kind in "iub" and is_known(initial[i])
    }
    return {i for i in scalars if _closure(body, {i}) <= scalars and _foldable(body, i)}


def _foldable(body: Region, i: int) -> bool:
    part, _ = restricted(body, (body.returns[i],))
    return all(can_fold(op) for op in part.operations)


def _slice_positions(body: Region, known: set[int]) -> list[int]:
    """Positions of slices in the body that depend on known values alone."""
    found = set()
    for op in body.operations:
        first = {"stablehlo.dynamic_slice": 1, "stablehlo.dynamic_update_slice": 2}.get(op.name)
        for value in op.operands[first:] if first is not None else ():
            _, needed = restricted(body, (value,))
            if needed <= known:
                found.add(value)
    return sorted(found)


def _simulate(
    condition: Region,
    body: Region,
    initial: list[Value],
    counting: list[int],
    starts: list[int],
    outer: dict[int, Value],
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], int] | None:
    """Count with the loop in NumPy: counters, slice positions and the number of steps."""
    targets = tuple(body.returns[i] for i in counting)
    advance, _ = restricted(body, targets + tuple(starts))
    asked, _ = restricted(condition, condition.returns)
    machine = Machine()
    state = list(initial)
    history = [[initial[i] for i in counting]]
    positions: list[list[Value]] = []
    for _ in range(_MOST_STEPS):
        (goes_on,) = machine.run(asked, state, outer)
        if not is_known(goes_on):
            return None
        if not goes_on:
            break
        results = machine.run(advance, state, outer)
        if not all(is_known(value) for value in results):
            return None
        values, places = results[: len(counting)], results[len(counting) :]
        for i, value in zip(counting, values, strict=True):
            state[i] = value
        history.append(values)
        positions.append(places)
    else:
        return None
    counters = {i: np.stack([row[n] for row in history]) for n, i in enumerate(counting)}
    sequences = {
        value: np.array([int(row[n]) for row in positions], int) for n, value in enumerate(starts)
    }
    return counters, sequences, len(positions)


def _take(array: Value, rows: np.ndarray) -> Value:
    if (rows == np.arange(len(array))[: len(rows)]).all() if len(rows) <= len(array) else False:
        return array[: len(rows)] if len(rows) < len(array) else array
    return jnp.take(jnp.asarray(array), rows, axis=0)


def _put(array: Value, rows: np.ndarray, updates: Value) -> Value:
    if len(rows) == len(array) and (rows == np.arange(len(array))).all():
        return updates
    return jnp.asarray(array).at[rows].set(updates, unique_indices=True)
