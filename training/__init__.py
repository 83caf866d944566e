"""Pretraining, fine-tuning and evaluation on Transformers' Trainer; run from a checkout, see the README."""

import hf_linear  # noqa: F401  registers the families with the Auto classes
