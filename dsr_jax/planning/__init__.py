"""Programs compiled for devices that are not there: memory, cost, least time, sweeps, reports."""
