"""Conversion of checkpoints to and from models of Hugging Face's transformers."""
