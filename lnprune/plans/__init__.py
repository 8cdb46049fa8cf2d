"""Which channels, decided on norms and names; a plan can outlive a model."""
