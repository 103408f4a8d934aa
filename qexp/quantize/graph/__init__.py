"""The traced model: its graph, canonical form, clamps and tensor names."""
