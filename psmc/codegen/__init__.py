"""From IR to source: ordered assignments, printers, templates."""
