"""What the network is: layer specs, trunk, heads and targets."""
