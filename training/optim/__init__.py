"""Optimizers, schedules, averages, and which parameters they act on."""
