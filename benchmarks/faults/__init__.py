"""What goes wrong on purpose, and what becomes of a run then."""
