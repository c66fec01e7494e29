"""The run directory and its records; reading a run imports neither torch nor optuna."""
