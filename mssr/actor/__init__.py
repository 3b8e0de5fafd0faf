"""The FSDP2 policy: `worker` is a rank, `update` the update step, `planning` says who computes what,
`prompts` keeps encoded prompts, `distributed` holds process group and sharding."""
