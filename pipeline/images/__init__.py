"""Encoded bytes -> frames that a network takes, and back: decoding, framing, geometry of boxes."""
