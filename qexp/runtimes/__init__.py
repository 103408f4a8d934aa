"""What executes a saved model: one file for each runtime, each with `export` and `load`."""
