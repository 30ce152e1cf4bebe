"""Predictors that can be saved: functions that remember how they were made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

_P = ParamSpec("_P")


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

    made: Callable[[Any], Recipe]
    """The recipe for what was computed; from `remembered`."""

    def __init__(
        self,
        call: Callable[..., Any],
        computed: Callable[[], Any] = lambda: None,
        take_over: Callable[[Any], None] = lambda computed: None,
    ):
        """`computed` tells what was computed so far; `take_over` hands it to a new predictor."""
        functools.update_wrapper(self, call)
        self._call, self._computed, self._take_over = call, computed, take_over

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<predictor of {self.recipe().maker}>"

    def recipe(self) -> Recipe:
        """How to make it again."""
        return self.made(self._computed())

    def resumed(self, computed: Any) -> Predictor:
        """Itself, with what another has computed."""
        self._take_over(computed)
        return self


def remembered(maker: Callable[_P, Predictor]) -> Callable[_P, Predictor]:
    """`maker`, whose predictors remember the arguments they were made with."""
    signature = inspect.signature(maker)

    @functools.wraps(maker)
    def make(*args: _P.args, **kwargs: _P.kwargs) -> Predictor:
        predictor = maker(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = {}
        for name, value in bound.arguments.items():
            further = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            arguments |= value if further else {name: value}
        predictor.made = functools.partial(Recipe, maker.__name__, arguments)
        return predictor

    return make
