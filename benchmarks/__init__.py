"""Side-by-side runs: each program prints a table and says what it measured."""
