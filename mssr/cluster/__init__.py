"""Where workers run. `base` is what the driver asks, `launch` starts who fulfils it: `local`, or
`ray_cluster` with its actors, `ray_workers`. `ray_generation` shares requests out among engines, `ray_calls`
watches all calls; `shared_prompts` travel from engines to ranks. `machine` says what a node has."""
