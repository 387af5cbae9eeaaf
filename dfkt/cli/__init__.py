"""The command line: ``python -m dfkt`` and the scripts in ``studies/``."""
