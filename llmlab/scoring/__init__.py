"""Multiple-choice scoring and perplexity."""
