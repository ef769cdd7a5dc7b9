"""``adi study``: Experiments on small models whose whole life is known, and on a real one."""
