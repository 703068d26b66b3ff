"""The step loop: requests in, tokens out. Knows nothing of gRPC."""
