"""What the heads' losses consist of, and what the trunk knows about upcoming tokens."""
