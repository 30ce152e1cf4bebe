"""The name of a layer: programs look at `__name__` of the three functions to tell layers apart."""

import pytest

from tangents import stax


@pytest.mark.parametrize(
    "name, layer",
    [
        ("Flatten", stax.Flatten()),
        ("Dense", stax.Dense(3)),
        ("serial", stax.serial(stax.Dense(2), stax.Relu())),
        ("FanOut", stax.FanOut(2)),
    ],
)
def test_the_three_functions_bear_the_name_of_the_layer(name, layer):
    assert [function.__name__ for function in layer] == [name] * 3


def test_a_layer_of_ones_own_bears_the_name_of_its_function():
    @stax.layer
    def Halve():
        init_fn = lambda rng, shape: (shape, ())
        apply_fn = lambda params, x, **kwargs: x / 2
        kernel_fn = lambda k, **kwargs: k / 2
        return init_fn, apply_fn, kernel_fn

    assert [function.__name__ for function in Halve()] == ["Halve"] * 3
