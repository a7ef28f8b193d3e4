"""Other libraries that load a compressed model."""
