"""INT8 accuracy on the target CPU."""
