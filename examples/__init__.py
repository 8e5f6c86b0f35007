"""The demonstration: a stock TRL training script, a corpus for it, and the comparison that `make demo` runs."""
