"""For developers: a sweep under random kills, and a count of what is lost (`python -m harness.soak`)."""
