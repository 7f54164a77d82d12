"""Stored weights of U-Nets: compute, save, apply and undo the differences between models."""
