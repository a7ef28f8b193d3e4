"""How good a model is, and what a job did."""
