"""What syncs and losses look like in the logs. Reads, and decides nothing."""
