"""Inspection of float and converted models: layers, their errors, executed operators, faults."""
