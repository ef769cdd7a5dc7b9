"""A network you may stop part-way. Knows nothing of exits."""
