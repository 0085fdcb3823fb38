"""What a finished network is on a device: integers alone."""
