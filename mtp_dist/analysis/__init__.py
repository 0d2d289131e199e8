"""Measurements of the heads' losses, and of what the trunk's output contains about the next tokens."""
