"""The local page on which attention, caches and rings are seen at work."""
