"""A command as a job of a Ray cluster: sent, followed, listed, stopped."""
