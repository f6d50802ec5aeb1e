"""Helpers for other libraries, each imported by whoever uses that library and by nobody else."""
