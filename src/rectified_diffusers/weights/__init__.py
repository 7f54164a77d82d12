"""Weights of U-Nets as they are stored: differences between models, made, saved, applied and taken back."""
