"""Commands that train what decoding uses beside a model: exits and drafters, and habits."""
