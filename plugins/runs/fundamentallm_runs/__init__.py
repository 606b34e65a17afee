"""Commands that look at runs: what a run folder holds is all they need."""
