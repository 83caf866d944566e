"""Checkpoints of other libraries in our words. Each file is a map, used by `from_pretrained` and by `conversion/`."""
