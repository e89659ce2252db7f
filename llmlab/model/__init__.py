"""A model: what its name means, its card, its weights."""
