"""Places that the scalars of a run are written to."""
