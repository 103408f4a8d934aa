"""Predictions, and the CPU that the model ships on."""
