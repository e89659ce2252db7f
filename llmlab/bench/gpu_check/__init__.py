"""`llmlab gpu-check`: whether this machine's GPUs compute what the plain path computes, and how fast."""
