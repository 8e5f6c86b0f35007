"""How it is measured: processes of their own, calls in turn, peak memory, the machine, and the record of all that."""
