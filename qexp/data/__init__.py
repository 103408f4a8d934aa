"""Images: the sets, their splits, their preprocessing."""
