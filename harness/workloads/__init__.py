"""What a trial measures: each module has `run(job, report)`, which measures the job's points
and reports them through an `EventReporter`."""
