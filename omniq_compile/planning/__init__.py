"""What compiling a model would do, without its weights."""
