"""A graph as a program to read: its nodes in words, its blocks once."""
