"""What trained models can do: tasks of lm-eval, code that they write, checkpoints of a running training."""
