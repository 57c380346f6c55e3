"""Scores of saved samples: sample files, Frechet distances, judges."""
