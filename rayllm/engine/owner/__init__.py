"""What whoever starts an engine does: its configuration, its driver, and the next driver when that one is lost."""
