"""Whether the best learning rate stays the same when a network gets wider: see `__main__`."""
