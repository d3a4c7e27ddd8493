"""Ternary layers without latent weights, and the files that they are kept in."""
