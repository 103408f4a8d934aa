"""The machine, its processes, the disk cache, the console and what must not be printed."""
