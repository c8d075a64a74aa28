"""Training itself: what a script starts, fits, steps, saves and finishes."""
