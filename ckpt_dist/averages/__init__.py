"""Averages: pure functions from tensors and numbers to a tensor."""
