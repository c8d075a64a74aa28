"""From files and hubs to batches: formats, rows, images, order, collators, the feature cache."""
