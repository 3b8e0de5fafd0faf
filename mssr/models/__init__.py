"""A Qwen2.5-VL as this project needs it: `loading`, `policy` (the packed forward pass), `packing`, `head`
(fused log-prob and entropy), and `tiny`, which makes small real ones."""
