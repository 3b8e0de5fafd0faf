"""The commands: `cli` reads them. Before a run `doctor` looks at machines (`machine_checks` of facts,
`gpu_checks` in processes of their own), `plan` at what fits, and `data_report` shows the data, as the page
data.html. `compare` sets finished ones side by side, as the text compare.jinja, with `run_curves` and
`compare_figure`.
"""
