"""16-bit sums: which kernels have them, what they cost, how layers avoid them."""
