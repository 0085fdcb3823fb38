"""Training-free scores of many cells at once."""
