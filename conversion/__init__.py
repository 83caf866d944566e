"""Checkpoints of other libraries written as ours: one script an origin, `python -m conversion.hyenadna --help`."""
