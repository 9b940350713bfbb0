"""Which parameters a function is radially invariant in, found by measurement."""
