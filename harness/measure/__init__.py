"""How numbers are taken: paired timing, memory passes, roofline ceilings, conditions, the correctness gate,
and the statistics that turn samples into intervals. Nothing here knows of sweeps, rows or verdicts."""
