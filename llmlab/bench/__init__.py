"""Benchmarks: each compares one optimization with a named, fairly tuned baseline in the same run."""
