"""Modes of adi and other tools on the same prompts, in turn."""
