"""16-bit accumulators: which kernels have them, the accuracy that they cost, and the guard against overflow."""
