"""Tables, charts, effects and sentences from run records."""
