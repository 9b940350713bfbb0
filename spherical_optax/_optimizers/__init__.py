"""Optimizers: chains of building blocks."""
