"""The middle floor: graph in, graph out; knows no device code."""
