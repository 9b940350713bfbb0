"""Cost of optimizers and of discovery for large networks, by simulation: see `__main__`."""
