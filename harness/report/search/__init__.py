"""The section of a report about a search."""
