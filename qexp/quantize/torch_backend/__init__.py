"""torch.ao's engines, and the workarounds for torch's bugs."""
