"""Quantized weights in files, and models filled from files."""
