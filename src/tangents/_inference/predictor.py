"""Predictors that can be saved: functions that remember how they were made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """What a predictor is made from, and what it has computed since.

    maker      name of the public function that made it
    arguments  of that function, by name
    computed   data; the predictor made anew takes it over by `resumed`
    """

    maker: str
    arguments: dict[str, Any]
    computed: Any


class Predictor:
    """A fitted predictor: call it; `tangents.save` saves it, with the factors it has computed."""

    def __init__(
        self,
        call: Callable[..., Any],
        maker: Callable[..., Any],
        arguments: dict[str, Any],
        computed: Callable[[], Any] = lambda: None,
        take_over: Callable[[Any], None] = lambda computed: None,
    ):
        """`computed` tells what was computed so far; `take_over` hands it to a new predictor."""
        functools.update_wrapper(self, call)
        self._call, self._maker, self._arguments = call, maker.__name__, arguments
        self._computed, self._take_over = computed, take_over

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<predictor of {self._maker}>"

    def recipe(self) -> Recipe:
        """How to make it again."""
        return Recipe(self._maker, self._arguments, self._computed())

    def resumed(self, computed: Any) -> Predictor:
        """Itself, with what another has computed."""
        self._take_over(computed)
        return self
