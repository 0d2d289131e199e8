"""Pretraining of language models that predict several future tokens at once."""
