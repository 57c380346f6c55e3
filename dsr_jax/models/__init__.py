"""Flax Linen modules: networks and nothing else."""
