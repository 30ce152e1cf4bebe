"""Infinitely wide networks: network graph, layers, dual activations, planner."""
