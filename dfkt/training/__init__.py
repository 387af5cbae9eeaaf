"""The one loop that runs any method's schedule, and what a run in one process needs around it."""
