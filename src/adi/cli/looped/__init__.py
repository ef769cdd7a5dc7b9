"""Commands about looped models."""
