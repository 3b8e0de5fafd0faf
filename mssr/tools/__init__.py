"""The commands: `cli` reads them. `data_report` shows the data of a run before it, as the page data.html;
`compare` sets finished ones side by side, as the text compare.jinja, with `run_curves` and `compare_figure`.
"""
