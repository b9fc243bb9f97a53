"""Compares two revisions, checkouts, results folders or benchmark files and says which became slower."""
