"""The robot benchmark: a small pi0_fast that knows seven tasks of MetaWorld learns more; what is kept of each?

`setup` loads policy, frames and anchors; `methods` has a training step of each method; `runs` makes one run and writes
down what was found; `summary` puts runs together, `figure` draws them, `command` is the command line.
"""
