"""What doubt there is, and what it is worth."""
