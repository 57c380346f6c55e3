"""Ahead-of-time compilation for absent devices: memory, cost, time bounds, sweeps, reports."""
