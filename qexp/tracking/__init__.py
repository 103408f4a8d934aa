"""MLflow: the store, a run, what is read back. No other package imports it."""
