"""The paper's experiments: its models, data, protocol and optimizers, and the demo."""
