"""Convolutional networks, and the vision Transformers of the same registry: classify, detect, segment, enlarge."""
