"""Makes exits. Never decodes by itself."""
