"""Plain weights and checkpoints of prepared models."""
