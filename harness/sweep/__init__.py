"""What a sweep is: its file (`load`, `model`, `check`), the axes and workloads there are (`catalog`), its
points (`point`, `grid`), and the metrics that rows carry (`metrics`)."""
