"""Rows to prompts: `dataset` reads rows by id, `encoder` turns one into text, images and tokens, `loading`
checks a source, `sampler` decides the order, `prompt_source` serves the workers, `digits` is the embedded
task."""
