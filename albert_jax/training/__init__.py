"""Training: the step, its optimizer, where arrays live, what is saved, and the loop."""
