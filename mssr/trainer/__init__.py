"""The driver. `train` is the command and `session` what it runs around `loop`, the training step on one page;
`fit` tells before whether memory is likely to do. In the order of a step: `data`, `pipeline` and `collect`
(with `early_log_probs`), `estimate`, `validation`, `watch`; `response_lengths` is what `collect` knows of a
prompt. `initial_values` come before the first step, and `timing` says how long each phase took."""
