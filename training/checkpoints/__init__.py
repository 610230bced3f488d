"""Saved states: their files, their layout, and how a run begins from one."""
