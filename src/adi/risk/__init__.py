"""How wrong a reflex may be: bounds, certificates, drift."""
