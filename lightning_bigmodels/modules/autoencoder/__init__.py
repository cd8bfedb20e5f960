"""Autoencoders of pictures: plain, denoising and sparse; variational and quantized."""
