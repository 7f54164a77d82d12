"""Generate, store and read triplets (prompt, noise, data) from a teacher."""
