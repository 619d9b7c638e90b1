"""One outer sync, and when it happens: units, pseudo-gradients, overlaps, the engine.

Nothing here knows the Trainer, Accelerate or checkpoints; FSDP2 and DDP are known by units.py alone.
"""
