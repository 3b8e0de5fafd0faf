"""The benchmarks that have a name, one module each; `mssr.evaluation.registry` imports them when asked for."""
