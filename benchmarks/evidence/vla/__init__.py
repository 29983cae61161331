"""The pieces of `retention_vla.py`, on top of `examples/pi0_fast_craft.py`: methods, runs, and what is made of them.

- `methods`: what is compared, and one training step of each.
- `runs`: one run: trained, measured, written as JSON.
- `summary`: rows over seeds, as a table, as Markdown and as CSV.
- `figure`: the picture.
- `command`: the command line, which files there are, and the page of docs/.
"""
