"""Functions that run in processes of their own: in one, or in several at once, joined by `torch.distributed`."""

import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

import torch
from torch import distributed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(  # what would be imported by every process: the first optimizer imports torch._dynamo
    ["tests.training", "minilora.public", "minilora.cli.finetune", "torch.distributed.fsdp", "torch._dynamo"]
)


def start_process(function, *arguments):
    """Start a process, whose status is what function(*arguments) returns; it has begun when this returns."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_exit, args=(there, torch.get_num_threads(), function, arguments))
    process.start()
    here.recv()
    return process


def _exit(connection, threads, function, arguments):
    torch.set_num_threads(threads)
    connection.send(True)
    sys.exit(function(*arguments))


def on_ranks(count, function, *arguments):
    """Call function(*arguments) in each of some processes; what it returns, by rank."""
    with tempfile.TemporaryDirectory() as place, ProcessPoolExecutor(count, mp_context=CONTEXT) as pool:
        ranks = [pool.submit(_join, f"file://{place}/store", rank, count, function, arguments) for rank in range(count)]
        return [each.result() for each in ranks]


def _join(place, rank, count, function, arguments):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=place, rank=rank, world_size=count, timeout=timedelta(seconds=120)
    )
    try:
        return function(*arguments)
    finally:
        distributed.destroy_process_group()


def on_launched(count, function, *arguments):
    """The same in processes that have the environment of torchrun, and join the others themselves."""
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    given = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with ProcessPoolExecutor(count, mp_context=CONTEXT) as pool:
        ranks = [
            pool.submit(_launch, {**given, "WORLD_SIZE": str(count), "RANK": str(rank)}, function, arguments)
            for rank in range(count)
        ]
        return [each.result() for each in ranks]


def _launch(environment, function, arguments):
    torch.set_num_threads(1)
    os.environ |= environment | {"OMP_NUM_THREADS": "1"}
    return function(*arguments)
