"""The machine and its lock, processes, the disk cache, downloads, the console and the masking of credentials."""
