"""Quantising a model's weights into AWQ's, GPTQ's and compressed-tensors' formats: see docs/quantize.md."""
