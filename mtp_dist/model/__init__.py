"""The network: layers, trunk, heads, targets, and the names and shards of its parameters."""
