"""Which cells are scored next, and the queue that scores them."""
