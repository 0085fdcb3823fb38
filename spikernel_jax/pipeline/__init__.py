"""The four steps, from settings to a chosen model."""
