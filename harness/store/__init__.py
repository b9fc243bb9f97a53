"""What is kept of a sweep: rows (`rows`) in append-only files (`lines`, `files`) or a database, as tables
(`frames`), and leases that say who measures what (`leases`, `processes`)."""
