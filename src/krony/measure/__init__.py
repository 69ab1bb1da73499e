"""Perplexity, speed, memory, bytes: what a model is worth and what it costs."""
