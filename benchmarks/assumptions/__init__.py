"""The paper's hypotheses, measured in a training: see `__main__`."""
