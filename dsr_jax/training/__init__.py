"""State, optimizer, training step, checkpoints and the loop that joins them."""
