"""Models that a command names: by class, configuration or function, and made up at random."""
