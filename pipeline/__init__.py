"""Dubito's library: what is possible. Importing it starts nothing.

storage -> formats -> datasets -> stream -> decode -> augment -> models -> losses -> train -> score
-> predictions (Parquet) -> evaluate. Imports point one way, from the right to the left of that line;
tests/test_architecture.py keeps it so.
"""

__version__ = "0.1.0"
