#!/usr/bin/env bash
# lerobot 0.6.1: the quantiles of a dataset are means of its episodes' quantiles, not quantiles of its frames.
#
# `aggregate_stats` puts them together so wherever episodes or datasets are joined; pi05 normalises states and actions by
# q01 and q99.
#
# Expected: of 200 frames in four episodes, each of which stays at one place, q01 and q99 are near the first and the last
#     place, as min and max are.
# Seen: all five quantiles are the mean of the places: the width that is normalised by is 0 where the data have 3. Where
#     an episode moves, the width is that of a typical episode, and places of others lie far outside of -1 to 1.
# Needs Python 3.12: PYTHON=python3.12 findings/lerobot_quantiles_of_a_dataset.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "lerobot[dataset]==0.6.1"
"$folder/env/bin/python" -W ignore - <<'PYTHON' | tee "$folder/seen"
import numpy as np
from lerobot.datasets.compute_stats import aggregate_stats, compute_episode_stats

features = {"action": {"dtype": "float32", "shape": (1,), "names": ["x"]}}
for name, reach in (("stays", 0.0), ("moves", 0.5)):
    path = np.linspace(-reach, reach, 50, dtype=np.float32)[:, None]
    episodes = [{"action": place + path} for place in range(4)]
    found = aggregate_stats([compute_episode_stats(episode, features) for episode in episodes])["action"]
    frames = np.concatenate([episode["action"] for episode in episodes])
    for key, q in (("min", 0.0), ("q01", 0.01), ("q50", 0.5), ("q99", 0.99), ("max", 1.0)):
        print(f"{name} {key}: dataset {found[key].item():.1f}, frames {np.quantile(frames, q):.1f}")
PYTHON
diff "$folder/seen" - <<'SEEN'
stays min: dataset 0.0, frames 0.0
stays q01: dataset 1.5, frames 0.0
stays q50: dataset 1.5, frames 1.5
stays q99: dataset 1.5, frames 3.0
stays max: dataset 3.0, frames 3.0
moves min: dataset -0.5, frames -0.5
moves q01: dataset 1.0, frames -0.5
moves q50: dataset 1.5, frames 1.5
moves q99: dataset 2.0, frames 3.5
moves max: dataset 3.5, frames 3.5
SEEN
