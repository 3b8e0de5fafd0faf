"""The commands: `cli` reads them. `doctor` looks at machines before a run, with `machine_checks` of facts and
`gpu_checks` in processes of their own. `data_report` shows the data of a run before it, as the page data.html;
`compare` sets finished ones side by side, as the text compare.jinja, with `run_curves` and `compare_figure`.
"""
