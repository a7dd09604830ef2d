"""The routes, one API a file."""
