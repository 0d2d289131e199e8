"""Evaluation of trained models: lm-eval, generated code, synthetic tasks, and the checkpoints of a running training."""
