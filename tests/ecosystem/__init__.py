"""Real training stacks, each in an environment of its own: stock and fused, compared. ``make ecosystem`` runs it."""
