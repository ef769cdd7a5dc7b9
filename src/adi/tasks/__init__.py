"""Tasks whose difficulty is known: generators with seeds, and splits that cannot leak."""
