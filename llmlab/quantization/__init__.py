"""Weights on a grid of few bits: round-to-nearest, GPTQ, rotation, packed Linears and their checkpoints."""
