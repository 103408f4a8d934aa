"""Static INT8 quantization experiments for CNNs on CPUs: what a setting costs in accuracy and gains in speed."""

__version__ = "0.1.0"
