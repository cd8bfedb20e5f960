"""Pure nn.Modules that no library ships: tensors in, tensors out."""
