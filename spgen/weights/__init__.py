"""Sparse weights: how they are stored, chosen, multiplied and trained."""
