"""Tools for a checkpoint, dense or compressed: evaluate, export and inspect it."""
