"""Serve one quantized base model with many LoRA adapters over gRPC."""
