"""The base model: loading, quantizing, running packed batches."""
