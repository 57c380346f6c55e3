"""The experiment of `tools/run_claims.py`: the paper's claims on handwritten digits."""
