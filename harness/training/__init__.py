"""How a model is trained and evaluated: the training loop (`trainer`), its clock, its checkpoints, and the
text it reads (`data`)."""
