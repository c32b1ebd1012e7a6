"""What a context and a ring will cost, before anything is loaded; no torch."""
