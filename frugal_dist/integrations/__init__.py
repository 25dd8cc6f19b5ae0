"""Glue to other libraries, thin."""
