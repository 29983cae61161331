"""Parts of `six_experiments.py`, each usable alone.

- `quiz`: questions about generated pictures, as files for `craft-optim eval-mcq` and as a dataset for anchors.
- `teaching`: the small pi0_fast learns to answer them and goes on opening its drawer.
- `commands`: steps that are skipped where their result is there.
- `success`: rollouts of a checkpoint of lerobot-train in the simulator.
- `comparison`: what all commands have found, as one record and one table.
- `plots`: the record as pictures.
"""
