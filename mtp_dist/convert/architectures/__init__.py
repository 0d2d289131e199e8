"""The architectures of transformers that can be imported and exported, a module per architecture."""
