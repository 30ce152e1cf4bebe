"""Kernels larger than one computation: tiles, devices, samples."""
