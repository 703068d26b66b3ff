"""The shared server: any hub, offered over gRPC to holders of tokens."""
