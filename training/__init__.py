"""Training, evaluation and data of BLIP-2: the scripts on top, what they are made of in rooms below."""
