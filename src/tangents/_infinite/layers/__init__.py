"""One file per family of layers: node, init, apply and infinite rule stand together."""
