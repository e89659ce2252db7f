"""Layouts of a model over devices."""
