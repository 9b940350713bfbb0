"""The paper's experiments: commands, and the packages that these share."""
