"""The command line: one module per command, each of which parses, calls one function and prints its result."""
