"""How a slowdown or a change is found: the benchmarks, their history, and two judges, `compare` (timed) and
`budget` (exact facts that need no GPU)."""
