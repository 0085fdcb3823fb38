"""What one experiment needs and no other."""
