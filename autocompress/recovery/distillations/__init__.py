"""Distillation losses, one file each: adding one is a new file here with a `METHOD` and a `DISTILLATIONS`."""
