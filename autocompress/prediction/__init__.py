"""Latency from a table: its rows and files, and the model of a layer's time that learns from it."""
