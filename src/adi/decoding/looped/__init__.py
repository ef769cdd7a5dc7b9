"""Looped models: halting place by place or item by item, and the answers to items of a task."""
