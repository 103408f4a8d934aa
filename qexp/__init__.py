"""Static INT8 quantization experiments for CNNs on CPUs: what a setting costs in accuracy and gains in speed."""

import os

__version__ = "0.1.0"

# Read by OpenMP when torch is imported, and left alone in the processes that time (qexp/latency/worker.py). Threads
# that spin while they wait hold up whatever else wants their core: with one busy neighbour on two cores, a forward pass
# of ResNet-18 took four times as long as with threads that sleep.
if "QEXP_WORKER" not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = os.environ["QEXP_WAIT_POLICY"] = "PASSIVE"
