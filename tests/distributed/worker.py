"""One of several processes: runs functions of the modules beside it, as they are asked for on stdin, until it ends."""

import importlib
import os
import pickle
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def main(rank: int) -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a case prints must not get between the answers
    torch.set_num_threads(1)

    while True:
        try:
            world_size, store, name, arguments = pickle.load(requests)
        except EOFError:
            break
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        torch.manual_seed(0)
        try:
            module, _, function = name.rpartition(".")
            answer = True, getattr(importlib.import_module(module), function)(**arguments)
        except Exception:
            answer = False, traceback.format_exc()
        if answer[0]:
            dist.barrier()
        pickle.dump(answer, answers)
        answers.flush()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
