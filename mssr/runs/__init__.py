"""What training and evaluation share. `config` reads a config and has every room check its section;
`run_directory` makes the directory of a run and holds it; `checkpoint` writes its checkpoints with a
`manifest` each, which `export` reads; `loggers` and `events` write what happens (as `jsonl`) and `console`
shows it; `plot` and `html` make the report; `signals` end a run."""
