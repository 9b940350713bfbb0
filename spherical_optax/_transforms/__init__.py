"""Building blocks, each of them an Optax transformation."""
