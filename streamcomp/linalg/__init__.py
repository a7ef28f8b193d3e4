"""The mathematics: tensors in, tensors out, no files and no models."""
