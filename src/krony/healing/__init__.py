"""Continued training that recovers what compression lost."""
