"""Corpora, tokenizers, and the deterministic order of the samples."""
