"""Every method, ours and the baselines: one method, one file, one class."""
