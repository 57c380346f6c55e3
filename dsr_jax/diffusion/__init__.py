"""Paths between data and noise, objectives, time sampling, guidance and samplers."""
