"""A study on disk: its folder, its tables, and where its figures come from. Knows nothing of training."""
