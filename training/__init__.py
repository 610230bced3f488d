"""The one training and evaluation loop, and what it is made of: one file an idea."""
