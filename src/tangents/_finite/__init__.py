"""Finite networks: the NTK operator, kernel functions, linearisation."""
