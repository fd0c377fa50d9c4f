"""Plans, models and runs as plain Python values."""
