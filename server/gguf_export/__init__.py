"""llama.cpp's file format: merged models and LoRA adapters, written, read back and compared."""
