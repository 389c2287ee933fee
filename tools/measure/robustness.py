r"""Accuracy of models on rotated, flipped and adversarial images, as the SAN paper tests its networks.

    python tools/measure/robustness.py --data-dir DIR --split test.tar --num-samples 500
    python tools/measure/robustness.py --data-dir DIR --split test.tar \
        --checkpoint output/train/*/last.pth.tar --plot FILE

Checkpoints are those of timm's train.py, with args.yaml in the same folder; --model takes pretrained weights. Runs in
folders NAME-seed0, NAME-seed1 and so on form one row with their mean. Images are resized to the input of each network,
then rotated by multiples of 90 degrees, flipped upside down or attacked. The attack is projected gradient descent (PGD)
on the pixels, towards a random other class for each image or, with --untargeted, away from the right class.

Public texts about the paper confirm that its attack is targeted and white-box. We could not read its size and number of
steps, so the defaults are ours.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from _runs import Run, network_of
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import timm_gsa
from timm_gsa.commands._files import written_whole
from timm_gsa.commands._inputs import load_weights, positive
from timm_gsa.models._families import tiny_models

TURNS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'clean': lambda images: images,
    '90 degrees': lambda images: images.rot90(1, (-2, -1)),
    '180 degrees': lambda images: images.rot90(2, (-2, -1)),
    '270 degrees': lambda images: images.rot90(3, (-2, -1)),
    'upside down': lambda images: images.flip(-2),
}


class OnPixels(nn.Module):
    """A model that takes pixels from 0 to 1 and normalises them."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer('std', torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model((images - self.mean) / self.std)


@dataclass(frozen=True)
class Attack:
    """Projected gradient descent in a ball of the maximum norm.

    Attributes:
        epsilon: Radius of the ball, in units of 1/255.
        step_size: Length of a step, in the same units.
        targeted: True: towards a given class; False: away from it.
    """

    epsilon: float = 8.
    step_size: float = 2.
    targeted: bool = True

    def start(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Random image in the ball around each image; the generator is on the CPU."""
        noise = torch.rand(images.shape, generator=generator).to(images.device) * 2 - 1
        return (images + noise * self.epsilon / 255).clamp(0, 1)

    def step(
            self,
            model: nn.Module,
            attacked: torch.Tensor,
            images: torch.Tensor,
            classes: torch.Tensor,
    ) -> torch.Tensor:
        """One step from `attacked` within the ball around `images`; pixels stay between 0 and 1.

        Args:
            model: Network on pixels from 0 to 1, in evaluation mode.
            attacked: Images where the step starts, (B, C, H, W).
            images: Images in the middle of the ball.
            classes: Class of each image to move towards or away from.
        """
        attacked = attacked.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(attacked), classes, reduction='sum')  # gradients independent of the batch
        gradient, = torch.autograd.grad(loss, attacked)
        step = gradient.sign() * self.step_size / 255
        moved = attacked.detach() - step if self.targeted else attacked.detach() + step
        radius = self.epsilon / 255
        return torch.maximum(torch.minimum(moved, images + radius), images - radius).clamp(0, 1)


def other_classes(labels: torch.Tensor, num_classes: int, generator: torch.Generator) -> torch.Tensor:
    """Another class for each label, drawn uniformly."""
    shift = torch.randint(1, num_classes, labels.shape, generator=generator)
    return (labels.cpu() + shift).to(labels.device) % num_classes


def probe(
        model: nn.Module,
        batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        attack: Attack,
        steps: Sequence[int],
        num_classes: int,
        seed: int = 0,
        device: torch.device | str = 'cpu',
) -> dict[str, float]:
    """Top-1 accuracy in percent under every rotation and after each number of steps of the attack.

    Args:
        model: Network on pixels from 0 to 1, in evaluation mode.
        batches: Images (B, C, H, W), pixels from 0 to 1, and labels; anything that can be iterated over.
        attack: The attack.
        steps: Numbers of steps after which accuracy is counted.
        num_classes: Number of classes, from which targets are drawn.
        seed: Seed of targets and starting points.
        device: Device of the model.

    Returns:
        Accuracy by condition; for a targeted attack also the share of images classified as their target.

    Raises:
        ValueError: An image is of a class that the model does not have.
    """
    generator = torch.Generator().manual_seed(seed)
    last = max(steps, default=0)
    counts = dict.fromkeys([*TURNS, *(f'PGD, {n} steps' for n in sorted(steps))], 0)
    hits, total = 0, 0
    for images, labels in tqdm(batches, desc='probing', unit='batch', disable=None):
        if labels.max() >= num_classes:
            raise ValueError(f'images have a class {int(labels.max())}, the model has {num_classes} classes from 0 on')
        images, labels = images.to(device), labels.to(device)
        total += len(labels)
        with torch.no_grad():
            for name, turn in TURNS.items():
                counts[name] += int((model(turn(images)).argmax(-1) == labels).sum())
        classes = other_classes(labels, num_classes, generator) if attack.targeted else labels
        attacked = attack.start(images, generator)
        for number in range(1, last + 1):
            attacked = attack.step(model, attacked, images, classes)
            if number in steps:
                with torch.no_grad():
                    found = model(attacked).argmax(-1)
                counts[f'PGD, {number} steps'] += int((found == labels).sum())
                hits += int((found == classes).sum()) if number == last else 0
    result = {name: 100 * count / total for name, count in counts.items()}
    if attack.targeted and last:
        result[f'target hit, {last} steps'] = 100 * hits / total
    return result


def load_batches(args: argparse.Namespace, config: dict[str, Any]) -> Any:
    """Batches of a data set at a network's input size, not normalised, sampled evenly over the data set."""
    dataset = create_dataset('', root=args.data_dir, split=args.split, transform=create_transform(
        config['input_size'],
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        normalize=False,  # uint8
    ))
    if len(dataset) == 0:
        raise ValueError(f'--split {args.split} of {args.data_dir} holds no images')
    count = min(args.num_samples or len(dataset), len(dataset))
    # Data sets are sorted by class, so that the first images would miss most classes.
    picked = Subset(dataset, [index * len(dataset) // count for index in range(count)])

    def collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = zip(*samples, strict=True)
        return torch.stack(images).float() / 255, torch.tensor(labels)

    return DataLoader(picked, batch_size=args.batch_size, collate_fn=collate, num_workers=args.workers)


def models(args: argparse.Namespace) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, network and data config of every model and checkpoint of the command line."""
    for name in args.model:
        model = timm.create_model(name, pretrained=True)
        yield name, model, resolve_model_data_config(model)
    for path in args.checkpoint:
        run = Run.of(path.parent)
        model = timm.create_model(run.args['model'], **run.model_args)
        load_weights(model, path)
        yield run.folder.name, model, run.data_config(model)


def by_network(results: dict[str, dict[str, float]]) -> dict[str, list[dict[str, float]]]:
    """Results of the runs of each network."""
    networks: dict[str, list[dict[str, float]]] = {}
    for name, result in results.items():
        networks.setdefault(network_of(name), []).append(result)
    return networks


def means(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each condition."""
    return {condition: statistics.mean(result[condition] for result in results) for condition in results[0]}


def table(results: dict[str, dict[str, float]]) -> str:
    """One row for each network, the mean of its runs, as Markdown."""
    conditions = list(next(iter(results.values())))
    lines = [
        '| network | runs | ' + ' | '.join(conditions) + ' |',
        '| --- | ---: |' + ' ---: |' * len(conditions),
    ]
    for name, members in by_network(results).items():
        mean = means(members)
        lines.append(f'| {name} | {len(members)} | ' + ' | '.join(f'{mean[each]:.1f}' for each in conditions) + ' |')
    return '\n'.join(lines)


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    """Accuracy of all networks side by side, condition by condition; of several runs the mean."""
    from matplotlib.figure import Figure

    networks = by_network(results)
    conditions = [name for name in next(iter(results.values())) if not name.startswith('target')]
    figure = Figure(figsize=(1.3 * len(conditions) + 1.5, 3.6), layout='constrained')
    axes = figure.add_subplot()
    width = 0.8 / len(networks)
    for number, (name, members) in enumerate(networks.items()):
        places = [index + (number - (len(networks) - 1) / 2) * width for index in range(len(conditions))]
        mean = means(members)
        axes.bar(places, [mean[condition] for condition in conditions], width, label=name)
    axes.set_xticks(range(len(conditions)), conditions)
    axes.set_ylabel('top-1 in %')
    axes.grid(axis='y', alpha=0.3)
    axes.legend(fontsize=8)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format='png', dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Probe the models of a command line, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or '').partition('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data-dir', required=True, help='data set')
    parser.add_argument('--split', required=True, help='its split, as timm names it: a folder or a tar')
    parser.add_argument('--model', metavar='NAME', nargs='+', default=[], help='models with pretrained weights')
    parser.add_argument(
        '--checkpoint', metavar='FILE', type=Path, nargs='+', default=[],
        help='checkpoints of train.py, in its output folder; without any and --model the tiny models of the package')
    parser.add_argument('--num-samples', type=positive, help='images, evenly picked; all if not given')
    parser.add_argument('--batch-size', type=positive, default=100)
    parser.add_argument('--workers', type=int, default=0, help='processes that read images')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--epsilon', type=float, default=8., help='most that a pixel is changed, of 255')
    parser.add_argument('--step-size', type=float, default=2., help='of the attack, of 255')
    parser.add_argument('--steps', type=positive, nargs='+', default=[2, 4, 10], help='numbers of steps of the attack')
    parser.add_argument('--untargeted', action='store_true', help='attack away from the right class')
    parser.add_argument('--seed', type=int, default=0, help='of targets and starting points')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures there')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='draw them there (needs matplotlib)')
    args = parser.parse_args(argv)
    if not args.model and not args.checkpoint:
        args.model = tiny_models()
    for name in ('epsilon', 'step_size'):
        if not 0 < getattr(args, name) <= 255:
            parser.error(f'argument --{name.replace("_", "-")}: must be in (0, 255], got {getattr(args, name)}')

    attack = Attack(args.epsilon, args.step_size, not args.untargeted)
    results: dict[str, dict[str, float]] = {}
    try:
        for name, model, config in models(args):
            batches = load_batches(args, config)
            on_pixels = OnPixels(model.eval(), config['mean'], config['std']).to(args.device)
            results[name] = probe(on_pixels, batches, attack, args.steps, model.num_classes, args.seed, args.device)
    except (RuntimeError, ValueError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    print(table(results))
    if args.json:
        report = dict(
            command=' '.join(['python', 'tools/measure/robustness.py', *(sys.argv[1:] if argv is None else argv)]),
            images=len(batches.dataset),
            attack=asdict(attack),
            seed=args.seed,
            versions=dict(torch=torch.__version__, timm=timm.__version__, timm_gsa=timm_gsa.__version__),
            top1=results,
        )
        with written_whole(args.json) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + '\n')
    if args.plot:
        draw(results, args.plot)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
