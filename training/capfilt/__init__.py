"""CapFilt: captions drawn by one model and ranked by another."""
