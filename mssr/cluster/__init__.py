"""Where workers run: `base` is the interface, `ray_cluster` and `local` fulfil it, `ray_workers` are the
Ray actors."""
