"""Make the weights of the FD-digits extractor: `python -m genmodels.metrics.train_digits_features [--out FILE]`.

The released file is the reference, not this script: training gives other bits on other machines, and distances under
other weights are not comparable. After replacing the file, set `digits_features.SHA256` to the printed checksum.
"""

import argparse
import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from ..data.digits import Digits
from ..rng import fold, generator
from .digits_features import WEIGHTS, DigitsNetwork, accuracy

EPOCHS, BATCH, LEARNING_RATE, NOISE = 30, 64, 4e-3, 0.4  # noise in levels: 0.05 of the network's range [-1, 1]


def augment(x: Tensor, g: Generator) -> Tensor:
    """Each image [B, 1, 8, 8] shifted by -1, 0 or 1 pixel in both directions, plus Gaussian noise."""
    rows, columns = torch.randint(0, 3, (2, len(x), 1), generator=g) + torch.arange(8)
    padded = nn.functional.pad(x, (1, 1, 1, 1))[:, 0]
    shifted = padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted[:, None] + NOISE * torch.randn(x.shape, generator=g)


def train(x: Tensor, labels: Tensor, seed: int = 0, epochs: int = EPOCHS) -> DigitsNetwork:
    """A classifier of x [N, 1, 8, 8], levels 0 … 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold("digits features", seed))
        network = DigitsNetwork()
    g = generator("digits features", seed, "batches")
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    loss = nn.CrossEntropyLoss(label_smoothing=0.05)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=g)[: len(x) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss(network(augment(x[rows], g)), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the feature extractor of FD-digits.")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the kernels are tiny, and threads make the result depend on their number
    data = Digits()
    x, labels = (torch.cat([f(s) for s in ("train", "val")]) for f in (lambda s: data.all(s).x, data.labels))
    network = train(x, labels, given.seed)
    save_file(network.state_dict(), given.out)
    print(
        f"test accuracy {accuracy(network, data.all('test').x, data.labels('test')):.4f} on {data.size('test')} items"
    )
    print(f"sha256 {hashlib.sha256(given.out.read_bytes()).hexdigest()}  {given.out}")


if __name__ == "__main__":
    main()
