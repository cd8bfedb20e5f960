"""Generative adversarial networks: two networks that learn in turns."""
