"""What may be chosen: a YAML file bound to one model."""
