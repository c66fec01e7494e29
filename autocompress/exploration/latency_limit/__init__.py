"""Proposals moved to just inside the latency limit."""
