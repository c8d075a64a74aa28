"""The report of an evaluation: page, picture and model card."""
