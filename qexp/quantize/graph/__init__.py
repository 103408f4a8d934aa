"""The traced model: its canonical form, clamps, tensor names."""
