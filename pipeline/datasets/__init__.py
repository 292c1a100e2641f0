"""Datasets: made from people's images and labels, opened, read."""
