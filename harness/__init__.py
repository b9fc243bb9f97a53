"""The harness: sweeps, measuring, tables and plots. It imports `moc`; `moc` never imports it.

Read the folders in this order: sweep, store, measure, training, workloads, search, run, report, forecast,
regression. docs/architecture.md says what each holds and what it may import.
"""
