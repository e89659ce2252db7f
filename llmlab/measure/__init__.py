"""Clocks, peaks, profiles and records."""
