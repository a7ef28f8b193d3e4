"""What a finished job has to tell: figures, warnings, a page and a model card."""
