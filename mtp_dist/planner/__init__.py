"""Arithmetic about a run that needs neither torch nor a process: sizes, FLOPs, peaks."""
