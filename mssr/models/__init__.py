"""A vision-language model as this project needs it, in the order of the data.

`loading` opens one, with `attention` and `vision` for parts of transformers' and `lora` for adapters.
Prompts come as in `encoded`; `packing` lays them end to end, `policy` runs the pass, `head` gives log-probs,
entropies and loss. `cost` is what a pass costs, `gpus` what there is to pay it; `shapes` are a
model's sizes from its config.json, `memory` what a run with it takes. `tiny` makes small real
models. `bounded_cache` and `files` are helpers of all rooms above.
"""
