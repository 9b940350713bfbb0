"""A small language model on the text of Python's own help: see `__main__`."""
