"""Times a step on one process and on two, ours against hand-written loops, and what saving adds to training.

`python tests/benchmarks/scaling.py` on a machine that does nothing else. The network is the quickstart's, the same on
all sides, with AdamW, bf16 autocast, clipping, and one thread for each process. `--quick` only shows that all runs.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from contestants import Clock
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from lightning_bigmodels.data import Text
from lightning_bigmodels.modules import CausalLanguageModel
from lightning_bigmodels.recipe_files import list_recipes

WARMUP = 3
BATCH = 4  # rows for each process
STRATEGIES = ["one process", "ddp", "fsdp2"]


def recipe() -> dict[str, Any]:
    path = next(recipe.path for recipe in list_recipes() if recipe.name == "text/quickstart")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def new_module() -> CausalLanguageModel:
    torch.manual_seed(0)
    values = recipe()["model"]["init_args"]
    return CausalLanguageModel(values["architecture"], {**values["config"], "attn_implementation": "sdpa"})


def new_data() -> Text:
    values = recipe()["data"]["init_args"]
    return Text(**{**values, "batch_size": BATCH})


def our_fit(strategy: str, steps: int, clock: Clock, folder: str, save_every: int | None = None) -> None:
    module = new_module()
    module.optimizer = lambda groups: clock.watch(AdamW(groups, lr=1e-3))
    saver = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=save_every)
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        strategy="auto" if strategy == "one process" else strategy,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[saver] if save_every else [],
        enable_checkpointing=save_every is not None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    clock.start()
    trainer.fit(module, datamodule=new_data())


def hand_loop(strategy: str, steps: int, clock: Clock, folder: str) -> None:
    """Train as one writes it with torch alone, over batches that lie in memory."""
    module = new_module()
    module.configure_model()
    network: nn.Module = module.network
    if strategy == "ddp":
        network = DistributedDataParallel(network)
    elif strategy == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in module.blocks():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(network, mesh=mesh)
    optimizer = clock.watch(AdamW(network.parameters(), lr=1e-3))
    batches = all_batches(steps)
    clock.start()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(input_ids=batch["input_ids"], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def all_batches(steps: int) -> list[dict[str, Tensor]]:
    data = new_data()
    data.prepare_data()
    data.setup("fit")
    loader: Iterator[dict[str, Tensor]] = iter(data.train_dataloader())
    return [next(loader) for _ in range(steps)]


def child(strategy: str, steps: int, rounds: int) -> None:
    """Time both sides in turns, in the processes that torchrun has started, and print what the first one saw."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sides: dict[str, Callable[..., None]] = {"ours": our_fit, "by hand": hand_loop}
    times: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        our_fit(strategy, 1, Clock(), folder)  # makes the process group, and the token cache
        for number in range(rounds):
            for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
                clock = Clock()
                sides[side](strategy, WARMUP + steps, clock, folder)
                times[side].append(statistics.median(clock.step_seconds(WARMUP)))
    if int(os.environ.get("RANK", 0)) == 0:
        ratios = [hand / ours for hand, ours in zip(times["by hand"], times["ours"], strict=True)]
        ours, hand = (statistics.median(times[side]) * 1e3 for side in ("ours", "by hand"))
        processes = int(os.environ.get("WORLD_SIZE", 1))
        rate = processes * BATCH * recipe()["data"]["init_args"]["block_size"] / ours * 1e3
        ratio = statistics.median(ratios)
        print(
            f"  {strategy:<12} ours {ours:7.1f} ms   by hand {hand:7.1f} ms   {rate:8,.0f} tokens/s   "
            f"{ratio:.3f} of by hand [{min(ratios):.3f} .. {max(ratios):.3f}], "
            f"at least 0.97: {'PASS' if ratio >= 0.97 else 'MISSED'}",
            flush=True,
        )


def child_saving(steps: int, rounds: int) -> None:
    """Time whole runs with and without checkpoints, in turns."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    kinds = {"none": ("fsdp2", None), "while training waits": ("fsdp2", 5), "while it goes on": ("fsdp2_async", 5)}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind in list(kinds)[:: 1 if number % 2 == 0 else -1]:
            strategy, every = kinds[kind]
            clock = Clock()
            with shared_folder() as folder:
                our_fit(strategy, WARMUP + steps, clock, folder, every)
            if number > 0:  # the first round warms up
                times[kind].append(clock.ends[-1] - clock.ends[WARMUP - 1])
    if int(os.environ["RANK"]) == 0:
        saves = (WARMUP + steps) // 5
        plain = statistics.median(times["none"])
        print(f"  {steps} steps without a checkpoint take {plain:.2f} s; with {saves}, each adds")
        for kind in list(kinds)[1:]:
            added = [(mine - base) / saves * 1e3 for base, mine in zip(times["none"], times[kind], strict=True)]
            print(f"    {statistics.median(added):7.1f} ms {kind} [{min(added):.1f} .. {max(added):.1f}]", flush=True)


@contextlib.contextmanager
def shared_folder() -> Iterator[str]:
    """Yield one folder for all processes, which the first one makes and removes."""
    folders = [tempfile.mkdtemp() if int(os.environ["RANK"]) == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(folders)
        yield str(folders[0])
        dist.barrier()
    else:
        with tempfile.TemporaryDirectory() as folder:  # the first fit makes the process group; it saves nothing
            yield folder
        return
    if folders[0] is not None and int(os.environ["RANK"]) == 0:
        subprocess.run(["rm", "-rf", folders[0]], check=True)


def start(processes: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    here = str(Path(__file__).resolve())
    command = [*(command if processes > 1 else [sys.executable]), here, *arguments]
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="Counted steps of a round.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds in which both sides take turns.")
    parser.add_argument("--quick", action="store_true", help="Two steps in one round.")
    parser.add_argument("--child", choices=[*STRATEGIES, "saving"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rounds = 2, 1
    run = {name: partial(child, name, args.steps, args.rounds) for name in STRATEGIES}
    run["saving"] = partial(child_saving, args.steps, args.rounds)
    if args.child:
        run[args.child]()
        return
    size = ["--steps", str(args.steps), "--rounds", str(args.rounds)]
    print(f"A step of {BATCH} x 256 tokens on each process")
    for name in STRATEGIES:
        start(1 if name == "one process" else 2, "--child", name, *size)
    print("Saving under FSDP2 on two processes")
    start(2, "--child", "saving", *size)


if __name__ == "__main__":
    main()
