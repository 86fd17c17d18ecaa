"""What was done to a model and why, for readers and for PyTorch's logs."""
