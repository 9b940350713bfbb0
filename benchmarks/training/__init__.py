"""The data, networks, optimizers and recipes of a run, and the loop that trains it."""
