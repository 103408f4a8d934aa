"""The timing protocol, its worker processes, timings that runs share."""
