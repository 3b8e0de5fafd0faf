"""A VLM as this project needs it: loading, packing, rope ids, the fused log-prob and entropy head."""
