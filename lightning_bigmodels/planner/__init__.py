"""Memory, FLOPs, communication and time of a recipe, before it runs."""
