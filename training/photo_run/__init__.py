"""What photos.py is made of: how long to train on how many photos, what is done and how long the rest takes, the report."""
