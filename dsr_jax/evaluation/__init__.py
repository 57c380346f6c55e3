"""Scores of saved samples: metrics, references, and the files that are read for them."""
