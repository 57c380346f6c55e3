"""One start of a long-running command: its folder, loop, evaluation and passes over data."""
