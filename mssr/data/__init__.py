"""Rows to prompts: `sources` opens what the user names as `tables` (`text_rows` reads JSON and CSV),
`columns` finds what is read, `images`, `messages` and `rows` read the cells, `index` checks a source and
keeps the outcome (`cache`), `dataset` reads rows by id over all sources, `validation_sets` are those of
`data.val`, `encoder` turns a row into text, images and tokens, `lengths` and `loading` drop what does not
fit, `sampler` decides the order, `prompt_source` serves workers, `digits` is the embedded task."""
