"""Pipelines of several components: loaded, called, and what they return."""
