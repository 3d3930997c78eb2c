"""The plan of a run before a GPU is held: layout, memory, traffic and speed, by formulas and by measured numbers."""
