"""Models of any architecture, one block at a time, through transformers' code."""
