"""Signatures of versions: who says that a version is theirs, and whose word is taken."""
