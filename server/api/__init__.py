"""gRPC in front of the engine: wire to nouns and back, nothing else."""
