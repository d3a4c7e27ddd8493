"""Products of packed codes with rows of bytes or floats."""
