"""Inner optimizers: what a replica's ranks step together, and nothing between replicas.

They stand on peers/ alone, know neither a sync nor the Trainer, and serve the plain Trainer as well.
"""
