"""The model in Flax linen: knows arrays; knows no files and no mesh."""
