"""All ranks of the tests: one process imports what they need and forks them; each runs functions as it is asked to."""

import gc
import importlib
import os
import pickle
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

HANG = timedelta(minutes=10)  # a collective that waits for so long waits for nobody, however busy the machine


def serve(rank: int, requests: Connection) -> None:
    """Answers (number of ranks, store, "module.function", arguments) with (succeeded, result or traceback)."""
    while True:
        world_size, store, name, arguments = pickle.loads(requests.recv_bytes())
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=HANG
        )
        torch.manual_seed(0)
        try:
            module, _, function = name.rpartition(".")
            answer = True, getattr(importlib.import_module(module), function)(**arguments)
        except Exception:
            answer = False, traceback.format_exc()
        if answer[0]:
            dist.barrier()
        requests.send_bytes(pickle.dumps(answer))  # `send` would share the memory of tensors
        dist.destroy_process_group()
        del answer
        # torch 2.11 frees a DDP module's group with the GIL held, and waits for its threads: one that has yet to let go
        # of a tensor waits for the GIL.
        time.sleep(0.02)
        # A run searches all objects that are not frozen for its DDP and FSDP modules: among its own it is quick. What
        # the last one has left, threads among it, must not be frozen with the rest.
        gc.collect()
        gc.freeze()


def main(modules: str, *descriptors: str) -> None:
    torch.set_num_threads(1)
    for module in modules.split(","):
        with suppress(ImportError):  # the test says what it needs
            importlib.import_module(module)
    gc.freeze()
    for rank, descriptor in enumerate(descriptors):
        if os.fork() == 0:
            with suppress(EOFError):
                serve(rank, Connection(int(descriptor)))
            os._exit(0)
    for _ in descriptors:
        os.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
