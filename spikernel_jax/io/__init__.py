"""What a run leaves on disk, and the processes that leave it; knows no science."""
