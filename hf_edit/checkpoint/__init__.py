"""What of an engine goes to disk and comes back, and when it is whole. The engine does not know it."""
