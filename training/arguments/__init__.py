"""Fields of the training scripts, and how a command line and a YAML file are read into them."""
