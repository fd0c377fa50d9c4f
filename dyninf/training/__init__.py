"""Training: data, losses and schedules that make exits work, and the loop."""
