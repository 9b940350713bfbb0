"""The steps of a training run, while it runs."""
