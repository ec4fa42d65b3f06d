"""The smallest script: a network that learns the sine, on as many workers as there happen to be.

    outlast launch --standalone --nproc-per-node 2 examples/mlp.py
"""

from functools import partial

import torch
from torch import nn
from torch.utils.data import TensorDataset

import outlast

run = outlast.init(seed=0, leaves=4)
torch.manual_seed(0)
x = torch.linspace(-3, 3, 4096).unsqueeze(1)
data = TensorDataset(x, torch.sin(x))
model = run.prepare(
    nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1)),
    optimizer=partial(torch.optim.AdamW, lr=1e-2),
    zero=1,
)
for step in run.steps(200):
    with step:  # a worker that dies in here is recovered, and the step goes on
        for inputs, targets in step.batches(data, batch_size=32):  # this rank's share of the leaves
            step.backward(nn.functional.mse_loss(model(inputs), targets))
    run.log(loss=step.loss)
    if run.rank == 0 and step.index % 50 == 49:
        print(f"step {step.index + 1}: loss {step.loss:.5f}", flush=True)
run.close()
