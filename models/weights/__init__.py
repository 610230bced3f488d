"""Official weights: tables of names, files, and how they are fitted to a model."""
