"""What run_evaluation.py is made of: fields, samples, journal, the four tasks, scores, result files, report and card."""
