"""What can be done with a checkpoint: evaluate, export and inspect it."""
