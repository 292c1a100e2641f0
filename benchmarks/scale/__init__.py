"""What grows with images, workers and ids, and what bounds it."""
