"""Tools for those who change a kernel: compile, tune, profile, train, and everything that wants a GPU."""
