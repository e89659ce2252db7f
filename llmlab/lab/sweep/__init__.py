"""One notebook over a grid of parameters."""
