"""Pretraining of bidirectional encoders (ALBERT first) on your own text with JAX and Flax."""
