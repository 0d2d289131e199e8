"""Devices, process groups and what ranks exchange; no model."""
