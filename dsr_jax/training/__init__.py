"""State, optimizer, training step, checkpoints and the training loop."""
