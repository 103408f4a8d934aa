"""The hand-over: a run's INT8 model in a folder that serves it without qexp."""
