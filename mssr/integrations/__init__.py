"""The single-rollout methods inside other trainers: TRL (`trl`) and verl (`verl`).

Thin: the arithmetic is `mssr.algorithms`, and nothing here imports another room of this package, so that
``pip install mssr`` without extras is enough beside theirs.
"""
