"""Data formats, one in a file."""
