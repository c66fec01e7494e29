"""One method without a search: pruning, int8, distillation."""
