"""Who drafts and how far: proposers, the controller, and what passes cost."""
