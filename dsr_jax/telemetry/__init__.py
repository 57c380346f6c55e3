"""Telemetry of runs: metrics, progress, speed, FLOPs, traces."""
