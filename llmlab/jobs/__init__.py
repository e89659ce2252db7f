"""What joins subjects: jobs over ranks, a model's own drafts, the scorer of lm-evaluation-harness."""
