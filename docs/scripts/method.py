"""The plots of docs/method.md, from toys whose first flow is known in closed form: python docs/scripts/method.py

Half a minute on one core. Needs the extra `docs`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot
from torch import Tensor, nn

from rectified_diffusers.evaluation.straightness import straightness
from rectified_diffusers.flow import Straight, euler, velocity_loss

IMAGES = Path(__file__).parents[1] / "images" / "method"
NOISE, DATA, PATH = "#8a93a8", "#d9480f", "#3b5bdb"
Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Mixture:
    """Data that is an equal mixture of Gaussians, with the velocity of its flow from N(0, 1) with independent pairs.

    Given the component k, x_t = t * data + (1 - t) * noise is Gaussian around t * m_k, so that E[data | x_t = x] is a
    softmax-weighted mean, and v(x, t) = E[data - noise | x_t = x] = (E[data | x_t = x] - x) / (1 - t).

    Args:
        means: `(K, D)`.
        std: of each component.
    """

    means: Tensor
    std: float

    def sample(self, count: int) -> Tensor:
        means = self.means[torch.randint(len(self.means), (count,))]
        return means + self.std * torch.randn(means.shape)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        time = t.clamp(max=0.999)[:, None, None]
        variance = time**2 * self.std**2 + (1 - time) ** 2
        apart = x[:, None] - time * self.means  # (B, K, D)
        weights = (-apart.square().sum(-1, keepdim=True) / (2 * variance)).softmax(dim=1)
        data = (weights * (self.means + time * self.std**2 / variance * apart)).sum(dim=1)
        return (data - x) / (1 - time[:, 0])


class Network(nn.Module):
    """A velocity v(x, t) of points `(B, 2)`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 2),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], dim=1))


def train(network: Network, noise: Tensor, data: Tensor, *, distil: bool, steps: int = 3000) -> Network:
    """Reflow, or distil into one step, on pairs: what the trainers of this package do with pictures."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(noise), (512,))
        t = torch.zeros(512) if distil else torch.rand(512)
        x_t, velocity = Straight().interpolate(noise[rows], data[rows], t)
        predicted = network(x_t, t)
        loss = velocity_loss(predicted, velocity)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def plot_crossing() -> None:
    """One dimension, time to the right: pairs cross, the flow's paths bend, reflow joins their ends."""
    torch.manual_seed(3)
    toy = Mixture(torch.tensor([[-2.0], [2.0]]), 0.25)
    noise = torch.randn(36, 1)
    drawn = toy.sample(len(noise))
    paths = euler(toy.velocity, noise, 200, return_trajectory=True)[..., 0]
    panels = {
        "Pairs drawn at random: paths cross": torch.stack([noise, drawn])[..., 0],
        "The flow fitted to them: no crossing, but bends": paths,
        "Reflow: its ends are the new pairs": paths[[0, -1]],
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        axis.plot(torch.linspace(0, 1, len(lines)), lines, color=PATH, alpha=0.55, linewidth=1)
        axis.scatter(torch.zeros(lines.shape[1]), lines[0], color=NOISE, s=12, zorder=3)
        axis.scatter(torch.ones(lines.shape[1]), lines[-1], color=DATA, s=12, zorder=3)
        axis.set(title=title, xlabel="t", xticks=[0, 1], xticklabels=["0, noise", "1, data"])
    save(figure, "crossing")


def plot_one_step() -> None:
    """Two dimensions: what one Euler step makes of noise, before reflow, after it, and distilled; and S over t."""
    torch.manual_seed(0)
    angles = torch.arange(6) * torch.pi / 3
    toy = Mixture(2.2 * torch.stack([angles.cos(), angles.sin()], dim=1), 0.18)
    noise = torch.randn(20_000, 2)
    data = euler(toy.velocity, noise, 100)
    reflowed = train(Network(), noise, data, distil=False)
    with torch.no_grad():
        drawn = euler(reflowed, noise, 50)
    distilled = Network()
    distilled.load_state_dict(reflowed.state_dict())
    distilled = train(distilled, noise, drawn, distil=True)
    fresh = torch.randn(1200, 2)
    with torch.no_grad():
        panels = {
            "1-rectified flow, 100 steps": euler(toy.velocity, fresh, 100),
            "1-rectified flow, 1 step": euler(toy.velocity, fresh, 1),
            "2-rectified flow, 1 step": euler(reflowed, fresh, 1),
            "distilled, 1 step": euler(distilled, fresh, 1),
        }
    figure, axes = pyplot.subplots(1, 4, figsize=(11, 3.1), sharex=True, sharey=True)
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        axis.scatter(*fresh.T, s=2, color=NOISE, alpha=0.2)
        axis.scatter(*points.T, s=3, color=DATA)
        axis.set(title=title, aspect="equal", xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), xticks=[], yticks=[])
    save(figure, "one_step")
    plot_straightness({"1-rectified flow": toy.velocity, "2-rectified flow": reflowed}, fresh)


def plot_straightness(flows: dict[str, Velocity], noise: Tensor) -> None:
    figure, axis = pyplot.subplots(figsize=(9, 2.6))
    for i, (name, velocity) in enumerate(flows.items()):
        found = straightness(velocity, noise, steps=200, bins=20)
        centres = (torch.tensor(found.edges[:-1]) + torch.tensor(found.edges[1:])) / 2
        axis.bar(centres, found.per_bin, width=0.045, color=[PATH, DATA][i], label=f"{name}, S(Z) = {found.total:.3f}")
    axis.set(xlabel="t", ylabel="deviation from straight")
    axis.legend(frameon=False)
    save(figure, "straightness")


def save(figure: Any, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(IMAGES / f"{name}.png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9})
    torch.set_num_threads(1)
    plot_crossing()
    plot_one_step()
