"""One training step on the sphere, in closed form. This folder knows nothing about training runs."""
