"""A model as this project needs it, in the order of the data.

`families` has what is each kind's own. `loading` opens a model, with `attention` and `vision` for parts of
transformers' and `lora` for adapters; `processor` stands before it. Prompts come as in `encoded`; `packing`
lays them end to end, `policy` runs the pass, `head` gives log-probs, entropies and loss. `shapes` are a
model's sizes from its config.json, which `published` finds; `cost` is what a pass costs, `gpus` what there is
to pay it, `rank_memory`, `memory` and `host_memory` what a run takes, `step_time` how long a step takes.
`tiny` makes small real models. `bounded_cache` and `files` are helpers of all rooms above.
"""
