"""Kernels: the definitions of the six pages, faster or in less memory. Importing this package registers them all."""

from minilora.kernels import attention, delta_rule, llama, lora, nf4

__all__ = ["attention", "delta_rule", "llama", "lora", "nf4"]
