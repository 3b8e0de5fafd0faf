"""The benchmarks that have a name, one module each; `mssr.evaluation.registry` imports those asked for."""
