"""What training and evaluation share: the run directory, its checkpoints (`checkpoint`, `manifest`,
`export`), what is written and shown of a run (`events`, `loggers`, `console`, `plot`), and the signals that
end one."""
