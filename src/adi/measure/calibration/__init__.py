"""From prompts to certificates."""
