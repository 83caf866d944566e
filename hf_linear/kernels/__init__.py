"""The recurrences in Triton. Importing this package imports triton; `hf_linear.ops` does so on the first call that needs it."""
