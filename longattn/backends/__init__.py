"""The ways to compute attention: `base` says what one is, `registry` holds the list, the rest are they."""
