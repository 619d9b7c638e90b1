"""The command `hf-edit`: plan, check, report. Reads files and numbers; nothing below imports it, and it trains nothing
but what `check --measure` is asked to."""
