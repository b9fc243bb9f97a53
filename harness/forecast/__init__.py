"""What a run will need: memory (`memory`), time (`duration`), and the plan as it is printed (`view`)."""
