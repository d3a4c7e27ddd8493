"""Running CPU kernels on several threads."""
