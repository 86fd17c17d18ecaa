"""What happens to a model that is compiled: the backend, by whole model or by blocks."""
