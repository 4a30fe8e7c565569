"""A study: its matrix of runs, its stages, their artifacts, and who executes them."""
