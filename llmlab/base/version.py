"""The version of llmlab, for records, checkpoints and ranks that must agree on it."""

__version__ = "0.1.0"
