"""The search: what may be chosen, which choices to try, which results count."""
