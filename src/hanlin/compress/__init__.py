"""Quantising a model's weights into files that Transformers, vLLM and LMDeploy load: see docs/quantize.md."""
