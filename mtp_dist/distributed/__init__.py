"""Devices, process groups and what ranks exchange; without a model and without DeepSpeed."""
