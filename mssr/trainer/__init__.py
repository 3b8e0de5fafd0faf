"""The driver. `train` is the command and `session` what it runs, with `recovery` around `loop`, the training
step on one page. In the order of a step: `data`, `pipeline` and `collect` (with `early_log_probs` and
`response_lengths`), `estimate` (with `last_visits`), `validation`, `watch`; `initial_values` come before the
first one, and `timing` says how long each phase took."""
