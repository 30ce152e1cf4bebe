"""The demonstration `tangents demo`: kernels of a real network on real images, start to end."""
