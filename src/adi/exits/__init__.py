"""Early exits: heads, signals, probes, and the triggers that decide when to stop."""
