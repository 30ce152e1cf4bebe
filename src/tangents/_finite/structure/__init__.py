"""The walk over a network's jaxpr that finds every use of every weight."""
