"""The FSDP2 policy, in the order of a step.

`worker` is a rank: it makes the model (`initial_weights`, `distributed`) and its optimizer (`optimizers`,
`adamw`). `update` runs the step: who computes what (`planning`), encoded prompts (`prompts`), what is known
and measured of their tokens (`step`), what is not finite (`guard`), what its passes cost (`operations`).
`sending` gives the weights away, `checkpoint` saves and loads.
"""
