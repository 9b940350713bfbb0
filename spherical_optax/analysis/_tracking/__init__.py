"""The steps of a training run, measured while it runs."""
