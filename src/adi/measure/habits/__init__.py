"""``adi habituate``: what a model's habits are worth, before and after."""
