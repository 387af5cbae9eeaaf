"""Images: read, split, held in memory, and cut into batches."""
