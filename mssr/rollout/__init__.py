"""Generation: `engine` is the interface, `queue` has its requests and `seeds` decides what is sampled;
`vllm_engine` (with `encoding` before it and `engine_process` in each of its processes) and `hf_engine`
fulfil it. Its `weights` come by one of the `transports` and are compared by `checksums`; `heartbeat` is its
signs of life."""
