"""How the model is spread over ranks and driven by DeepSpeed's pipeline engine."""
