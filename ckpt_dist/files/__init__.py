"""Files: bytes, not tensors. Headers of safetensors and zip archives, restricted unpickling, dtypes by name."""
