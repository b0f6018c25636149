"""Kernels: the definitions of the six pages, faster or in less memory. Importing this package registers them all."""

from minilora.kernel import attention, decoder, lora, loss, nf4

__all__ = ["attention", "decoder", "lora", "loss", "nf4"]
