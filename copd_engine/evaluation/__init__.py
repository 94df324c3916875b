"""Evaluation of finished models: scores and their intervals, samples on disk, the run, the table."""
