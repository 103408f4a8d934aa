"""The ways to quantize a model: one file each."""
