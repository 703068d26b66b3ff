"""The versioned adapter registry. Imports no torch."""
