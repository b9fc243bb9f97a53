"""The harness: sweeps, measuring, tables and plots. It may import `moc`; `moc` never imports it.

Read in this order: metrics, points, job, spec, store, study, trial, worker, runner, report, cli.
"""
