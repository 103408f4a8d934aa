"""The converted model looked at: its layers, their errors, the operators executed."""
