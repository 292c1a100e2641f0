"""One run's order of rows, as one Ray Dataset, and what of it was used."""
