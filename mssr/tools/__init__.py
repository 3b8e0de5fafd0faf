"""The commands: `cli` reads them; `data_report` shows the data of a run before it, `compare` sets finished
ones side by side."""
