"""The Optuna study: which networks to try, and which results count."""
