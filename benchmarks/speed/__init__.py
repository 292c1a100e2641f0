"""Speed beside peers, both sides in one call."""
