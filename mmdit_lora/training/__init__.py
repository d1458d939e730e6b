"""Training: one step, the loop, checkpoints, tracking."""
