"""Directories for where krony is not installed, and quantized ones."""
