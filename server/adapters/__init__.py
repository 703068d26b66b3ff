"""Adapters on their way from the hub into the batch."""
