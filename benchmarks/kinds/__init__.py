"""Networks with habits, walked from the door to the engine."""
