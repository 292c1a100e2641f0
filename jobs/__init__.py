"""What happens: one short story a verb, each ``dubito <verb>`` and ``python -m jobs.<verb>``."""
