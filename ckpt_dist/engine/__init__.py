"""The engine: the only place that moves bytes. It knows tiles, addresses and files, and nothing of models."""
