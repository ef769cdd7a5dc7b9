"""Reads steps, changes nothing."""
