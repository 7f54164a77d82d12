"""Trainers: each is its loss, the loop is shared. Importing this package does not import torch."""
