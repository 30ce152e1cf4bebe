"""Stands in for TensorFlow, of which neural-tangents' import reads two type names and no more."""

from types import SimpleNamespace


class Module:
    pass


class _PolymorphicFunction:
    pass


types = SimpleNamespace(experimental=SimpleNamespace(PolymorphicFunction=_PolymorphicFunction))
