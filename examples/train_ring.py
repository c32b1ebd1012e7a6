"""Trains a small Llama whose sequences lie over a ring of processes, with FSDP2 beside it.

    torchrun --nproc-per-node=4 examples/train_ring.py --ring 2 [--length 256] [--steps 50]
    torchrun --nproc-per-node=4 --max-restarts=3 examples/train_ring.py --ring 2 --checkpoints runs

Four processes in rings of two: each ring has its own rows of the batch, each process half of every
sequence, and the weights are cut over all four. `--check` trains the same model in one process
afterwards and compares the losses. With `--checkpoints` a run that is started again, by you or by
torchrun after a process was lost, goes on from the last one, on as many processes as you like.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

import attnspan as span
from attnspan.evaluation.texts import python_heldout
from attnspan.ring.groups import init

RATE = 1e-3


def model_for(length: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=length,
        )
    )


def batches(rows: int, length: int, steps: int, done: int = 0) -> list[Tensor]:
    """`(rows, length)` bytes of Python's library for each step that isn't done."""
    text = torch.tensor(list(python_heldout().encode()), dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - length, (steps, rows), generator=generator)[done:]
    return [torch.stack([text[s : s + length] for s in row]) for row in starts.tolist()]


def losses_alone(options: argparse.Namespace) -> list[float]:
    """What one process loses in each step."""
    model = model_for(options.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for ids in batches(options.rows, options.length, options.steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses_in_rings(options: argparse.Namespace, mesh: DeviceMesh) -> list[float]:
    """The same over all processes; the mean over the rows that other rings hold is taken."""
    device, first = mesh.device_type, dist.get_rank() == 0
    model = model_for(options.length).to(device)
    everyone = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = load(options.checkpoints, model, optimizer) if options.checkpoints else []
    if losses and first:
        print(f"goes on after step {len(losses)}", flush=True)
    dist.barrier()  # torch's patience, not the ring's, covers what is slow to load
    each = options.rows // mesh["rows"].size()
    mine = slice(mesh.get_local_rank("rows") * each, (mesh.get_local_rank("rows") + 1) * each)
    with span.attach(model, ring=mesh["ring"]):
        for batch in batches(options.rows, options.length, options.steps, len(losses)):
            ids = batch[mine].to(device)
            # The whole sequence's loss, of which this process computes its tokens' part. FSDP2
            # takes the mean of the gradients over all processes, which is that of one process.
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = loss.detach()
            dist.all_reduce(mean, group=mesh["rows"].get_group())
            losses.append(mean.item() / mesh["rows"].size())
            done = len(losses)
            if first and done % 10 == 0:
                print(f"step {done}: loss {losses[-1]:.5f}", flush=True)
            if options.checkpoints and done % options.every == 0:
                save(options.checkpoints, model, optimizer, losses)
    return losses


def save(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    """Writes weights and the optimizer's state, whole; a reader sees a finished file or none."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for kind, x in (("weight", parameter.detach()), *state.items()):
            whole = x.full_tensor() if isinstance(x, DTensor) else x  # all processes take part
            if dist.get_rank() == 0:
                tensors[f"{kind}/{name}"] = whole.cpu().clone()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{len(losses):06}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        save_file(tensors, unfinished, {"losses": json.dumps(losses)})
        os.replace(unfinished, path)
        for old in sorted(folder.glob("step-*.safetensors"))[:-2]:
            old.unlink()
    dist.barrier()  # likewise, the writing


def load(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Takes up the last checkpoint, whichever number of processes wrote it; gives its losses."""
    finished = sorted(path.name for path in folder.glob("step-*.safetensors"))
    last = finished[-1:] or [None]
    dist.broadcast_object_list(last, src=0)  # the first process decides
    if last[0] is None:
        return []
    with safe_open(folder / last[0], "pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            state = {}
            for key in file.keys():  # noqa: SIM118
                kind, _, of = key.partition("/")
                if of != name:
                    continue
                x = file.get_tensor(key)
                if x.dim() and isinstance(parameter, DTensor):
                    x = x.to(parameter.device)
                    # Each process reads the file and keeps its own part.
                    x = distribute_tensor(
                        x, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )
                state[kind] = x
            parameter.copy_(state.pop("weight"))
            optimizer.state[parameter] = state
        return json.loads(file.metadata()["losses"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ring", type=int, default=2, help="processes that share a sequence")
    parser.add_argument("--rows", type=int, default=2, help="sequences of a batch, over all rings")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="write and resume there")
    parser.add_argument("--every", type=int, default=10, help="steps from checkpoint to checkpoint")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="write the losses as JSON")
    parser.add_argument("--check", action="store_true", help="compare with one process")
    options = parser.parse_args()
    if min(options.ring, options.rows, options.length, options.steps, options.every) < 1:
        parser.error("--ring, --rows, --length, --steps and --every are at least 1")
    world = int(os.environ.get("WORLD_SIZE", "0"))
    if not world:
        parser.error("start it with torchrun --nproc-per-node=N")
    if world % options.ring:
        parser.error(f"--ring is {options.ring}; a divisor of the {world} processes is allowed")
    if options.length % (2 * options.ring) and options.ring > 1:
        multiple = 2 * options.ring
        parser.error(f"--length is {options.length}; a multiple of {multiple} is allowed")
    if options.rows % (world // options.ring):
        parser.error(f"--rows is {options.rows}; a multiple of {world // options.ring} is allowed")
    return options


def main() -> None:
    options = arguments()
    gpu = torch.cuda.is_available()
    # FSDP's own collectives notice a process that hangs by this time-out, the ring's much sooner.
    init("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=60)
    shape = (dist.get_world_size() // options.ring, options.ring)
    mesh = init_device_mesh("cuda" if gpu else "cpu", shape, mesh_dim_names=("rows", "ring"))
    losses = losses_in_rings(options, mesh)
    if dist.get_rank() == 0:
        if options.losses:
            unfinished = options.losses.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({"losses": losses}))
            os.replace(unfinished, options.losses)
        if options.check:
            alone = losses_alone(options)
            apart = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
            print(f"{'step':>5} {'rings':>10} {'alone':>10}")
            for step in range(0, options.steps, max(1, options.steps // 6)):
                print(f"{step + 1:>5} {losses[step]:>10.5f} {alone[step]:>10.5f}")
            print(f"furthest apart: {apart:.1e}; 1e-4 is allowed")
            if not apart <= 1e-4:
                raise SystemExit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
