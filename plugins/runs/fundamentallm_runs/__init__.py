"""Commands that list, watch, compare and repeat runs, from their folders alone."""
