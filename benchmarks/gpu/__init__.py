"""A quarter of an hour on a GPU that is lent, used by two calls of one command: see `__main__`."""
