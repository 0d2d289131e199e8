"""Arithmetic about a run, without torch: parameters, FLOPs, memory, partition."""
