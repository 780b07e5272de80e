"""Text to token store to training batches. Knows files and NumPy; knows no JAX."""
