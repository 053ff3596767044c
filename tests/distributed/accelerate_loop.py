"""A loop of one's own with Accelerate: a model of this library whose levels write. Run by test_accelerate.py.

torchrun --nproc-per-node 2 tests/distributed/accelerate_loop.py
"""

import json

import torch
from accelerate import Accelerator

from nestling.hf import NestlingForCausalLM
from nestling.models import build

STEPS, ROWS, LENGTH, VOCABULARY = 6, 4, 33, 32


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same initial weights on every process
    made = build("hope-attention", "tiny", vocab_size=VOCABULARY, dim=16, depth=1, heads=2, periods=(8.0, 16.0))
    model, accelerator = NestlingForCausalLM.of(made), Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(STEPS):
        ids = (torch.arange(LENGTH) + torch.arange(ROWS)[:, None] * (step % 3 + 1)) % VOCABULARY  # the whole batch
        with accelerator.split_between_processes(ids) as mine:  # this process's rows
            loss = model(mine, labels=mine, learn=True).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(json.dumps({"processes": accelerator.num_processes, "losses": losses}), flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
