"""Habits of small models whose whole life is known: depth against the number of times that a fact was met."""
