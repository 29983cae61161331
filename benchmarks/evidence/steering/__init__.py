"""Whether the drift is where epsilon says: runs of `knob.py`, on the settings of `pareto` and on two small problems."""
