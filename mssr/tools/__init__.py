"""What is done with a finished run: `plot` and `export`."""
