"""Conversion of checkpoints to and from Hugging Face's Llama."""
