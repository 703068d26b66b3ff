"""Continual adaptation: one base, task after task, and a measure of what was forgotten."""
