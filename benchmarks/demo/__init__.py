"""The demo and the grid that chose its learning rates: see `__main__`."""
