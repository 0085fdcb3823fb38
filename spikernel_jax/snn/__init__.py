"""Spiking neurons, the network of a cell, what it costs."""
