"""One run or a sweep: planning, processes, signals, resuming, progress."""
