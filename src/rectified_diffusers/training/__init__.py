"""Trainers: each one defines a loss, and all share one loop. Importing this package does not import torch."""
