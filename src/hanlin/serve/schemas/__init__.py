"""What requests may hold, one API a file."""
