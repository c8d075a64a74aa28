"""Files, signals, fingerprints and the environment of a run; knows nothing of models or data."""
