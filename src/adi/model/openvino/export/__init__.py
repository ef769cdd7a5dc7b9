"""From a transformers model to a folder that the compiled engine opens."""
