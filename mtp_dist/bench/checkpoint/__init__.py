"""`mtp-dist bench checkpoint`: how fast a model is saved and loaded, and how long training waits for it."""
