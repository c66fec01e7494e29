"""The child process that builds, runs and times engines, and the timing protocol; imports no torch."""
