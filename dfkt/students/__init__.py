"""Students after their training: packages that one can use, and what they cost."""
