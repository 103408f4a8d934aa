"""Settings: their schema, how Hydra composes them, what they mean for a run's identity."""
