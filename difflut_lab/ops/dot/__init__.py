"""Dot products of codes of two bits with bytes or floats, as instructions."""
