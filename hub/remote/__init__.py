"""A hub behind a server, seen from the client: `grpc://host:port` and `grpcs://host:port`."""
