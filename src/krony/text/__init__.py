"""Texts by name and by file, to documents and packed blocks of tokens."""
