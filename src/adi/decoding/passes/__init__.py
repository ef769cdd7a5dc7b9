"""Passes that sequences share."""
