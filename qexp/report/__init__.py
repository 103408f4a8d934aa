"""From records to metrics, tables, charts and effects."""
