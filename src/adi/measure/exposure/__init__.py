"""Habits: depth against familiarity, on small models whose whole life is known and on a real one; what each depth knows."""
