"""The job: the only place that orders steps, and survives being killed between any two."""
