"""The command line: one file a family of commands."""

from krony.cli.app import app, main

__all__ = ["app", "main"]
