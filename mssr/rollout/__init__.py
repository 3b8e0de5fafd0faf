"""Generation: `engine` is the interface, `queue` has its requests and `seeds` decides what is sampled;
`vllm_engine` and `hf_engine` fulfil it. `weights` is how new ones reach it, `heartbeat` its signs of life."""
