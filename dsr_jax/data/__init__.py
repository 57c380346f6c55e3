"""Images and labels from disk to host memory; every batch is a function of (seed, step)."""
