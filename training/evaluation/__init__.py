"""Evaluation, predictions, results, reports and exported models."""
