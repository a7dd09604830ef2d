"""The HTTP server: one process, several models, the APIs that clients already speak."""
