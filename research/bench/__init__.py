"""Baselines and measurements printed beside the neural models."""
