"""The commands: `cli` reads them. `data_report` shows the data of a run before it (its page is data.html), and
`compare` sets finished ones side by side (with `run_curves` and `compare_figure`; its text is compare.jinja)."""
