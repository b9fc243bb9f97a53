"""How numbers are taken: paired timing, memory passes, roofline ceilings, conditions, the correctness gate,
and the statistics that turn samples into intervals and verdicts. Nothing here knows of sweeps or rows."""
