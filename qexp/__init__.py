"""Static INT8 quantization experiments for CNNs on CPUs: what a setting costs in accuracy and gains in speed."""

import os

__version__ = "0.1.0"

# Read by OpenMP when torch is imported. Threads that spin while they wait hold up whatever else wants their core: with
# one busy neighbour on two cores, a forward pass of ResNet-18 took four times as long as with threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
