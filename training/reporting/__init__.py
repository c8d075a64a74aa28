"""What a run tells: metrics, curves, trackers and warnings about its health."""
