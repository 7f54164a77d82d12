"""Triplets (prompt, noise, data) that a teacher made: generating, storing and reading them."""
