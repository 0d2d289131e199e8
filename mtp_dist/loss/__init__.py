"""From the heads' logits to the training loss."""
