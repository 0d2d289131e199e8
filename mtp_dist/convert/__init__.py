"""Models to and from Hugging Face's Llama."""
