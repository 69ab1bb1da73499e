"""Factored models in plain torch: what travels with self-contained models.

They import torch and transformers, and nothing of krony; every other room may import them.
"""
