"""Small layers, by topic."""
