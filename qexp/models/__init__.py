"""The float model: architectures, checkpoints, training."""
