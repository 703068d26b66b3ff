"""Data to adapters: training, evaluation, continual adaptation."""
