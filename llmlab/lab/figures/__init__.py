"""Figures, a file a subject."""
