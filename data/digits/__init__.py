"""The built-in set: scikit-learn's handwritten digits as a TFDS builder (a package of its own, as TFDS requires)."""
