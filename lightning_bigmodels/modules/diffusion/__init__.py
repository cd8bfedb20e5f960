"""Diffusion models: pictures made of noise, step by step, by networks of diffusers."""
