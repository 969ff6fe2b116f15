"""Results of experiments on features, as plain rows."""
