"""Where workers run. `base` is what the driver asks, `launch` starts who fulfils it: `local`, or
`ray_cluster` with its actors, `ray_workers`. `ray_start` joins Ray, `placement` finds places, `preflight`
looks at the nodes, of which `machine` says what they have. `ray_generation` shares requests out among
engines, `ray_calls` watches all calls, `faults` tells what a failure means; `shared_prompts` travel from
engines to ranks, and weights back, in `turns`."""
