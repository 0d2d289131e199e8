"""The model under DeepSpeed's pipeline engine."""
