"""Cells as sequences of codes: NumPy only."""
