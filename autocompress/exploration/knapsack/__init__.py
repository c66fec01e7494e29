"""A sampler for any Optuna study whose costs add up over its parameters; knows no models."""
