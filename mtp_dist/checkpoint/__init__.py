"""Checkpoints that open at any layout: format, search, saving and restoring."""
