"""What an edge of a cell may hold."""
