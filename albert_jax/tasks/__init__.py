"""What a trained encoder is used for: read, featurise, answer."""
