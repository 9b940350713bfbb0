"""Which runs a table needs, where they are stored, and the processes that make them."""
