"""Ground floor: axes, trees, precision, memory, errors. Knows no other room."""
