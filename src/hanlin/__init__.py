"""Hanlin: the maintained home of the InternLM and ChatGLM chat models."""

__version__ = "0.1.0"
