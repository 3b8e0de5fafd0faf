"""Generation: `engine` is the interface, `vllm_engine` and `hf_engine` fulfil it, `worker` wraps one,
`weights` is how new weights reach it, `seeds` decides what is sampled."""
