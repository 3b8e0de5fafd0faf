"""The driver: `train` is the command, `session` what it runs, `loop` the training step on one page;
`checkpoint`, `run_directory`, `loggers`, `console` and `signals` are what it writes, shows and hears."""
