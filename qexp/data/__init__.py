"""Data sets: loading, preprocessing and the calibration images."""
