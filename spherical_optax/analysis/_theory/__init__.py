"""One training step, in closed form."""
