"""The outside: the Trainer, Accelerate and hand-written loops. No arithmetic of the method lives here."""
