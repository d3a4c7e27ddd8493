"""Convolutions of bytes with packed codes."""
