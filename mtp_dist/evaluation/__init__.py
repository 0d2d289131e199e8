"""What trained models can do: tasks of lm-eval, and the evaluation of each checkpoint of a running training."""
