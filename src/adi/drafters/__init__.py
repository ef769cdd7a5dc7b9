"""Who proposes tokens without running the deep layers."""
