"""Logical axes, meshes, shardings and processes."""
