"""Compiling kernels ahead of time."""
