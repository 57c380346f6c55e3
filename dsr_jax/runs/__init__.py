"""One start of a command that works for long: its folder, loop, evaluation and passes over data."""
