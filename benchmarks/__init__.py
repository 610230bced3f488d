"""Measurements by hand: ratios against a named peer or a bound, each from one run. No test reads a clock."""
