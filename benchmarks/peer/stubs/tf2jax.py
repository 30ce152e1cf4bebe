"""Stands in for tf2jax, which neural-tangents imports and uses in its TensorFlow functions only."""
