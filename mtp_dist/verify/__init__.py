"""Checks of a run on the machine that it will use."""
