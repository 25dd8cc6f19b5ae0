"""Glue to other libraries and to backward passes, thin."""
