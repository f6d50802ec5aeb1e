"""Tensors and modules spread over processes, without any knowledge of layers."""
