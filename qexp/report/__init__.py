"""Reports of runs that are kept in MLflow: what to ship, how sure that is, and what mattered."""
