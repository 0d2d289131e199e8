"""Saving and opening what a run has learned, independent of the layout."""
