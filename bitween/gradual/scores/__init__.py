"""What damage each block, layer and scheme does, in nats of KL per token."""
