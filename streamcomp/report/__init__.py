"""The report of a finished job: figures, warnings, a page and a model card."""
