"""Content of a repository on the Hub, made from the registry and the recorded results.

An entry is an architecture with trained weights, named arch.tag. Its folder hub_configs/<entry>/ holds its repository
without the weights: config.json, README.md (the model card) and test/rand_tensors.safetensors (a fixed input with the
model's outputs, as in timm's own repositories); and entry.yaml, which is not published.
"""
from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file, save

import timm_gsa
from timm_gsa.commands._files import hub_config, written_whole
from timm_gsa.models._families import family_of
from timm_gsa.models._weights import ORGANIZATION, WEIGHTS_NAME

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'hub_configs'
PACKAGED = Path(timm_gsa.__file__).parent / 'weights'
SEED = 0
TENSORS = 'test/rand_tensors.safetensors'


class EntryError(Exception):
    """An entry is not what it should be."""


class Entry:
    """One entry: its files, their content, and checks of them.

    Args:
        name: arch.tag.

    Raises:
        EntryError: No results are recorded under that name.
    """

    def __init__(self, name: str) -> None:
        if name not in all_entries():
            raise EntryError(f'no entry {name!r}; there are {", ".join(sorted(all_entries()))}')
        self.name = name
        self.arch, _, self.tag = name.partition('.')
        self.results_path = PACKAGED / f'{self.tag}.json'
        self.results = json.loads(self.results_path.read_text(encoding='utf-8'))
        self.record = self.results['models'][name]
        self.folder = CONFIGS / name

    @property
    def weights(self) -> Path:
        """File of the weights: in the package, or in the entry's folder if it is too large for the wheel."""
        packaged = PACKAGED / f'{self.name}.safetensors'
        return packaged if packaged.is_file() else self.folder / WEIGHTS_NAME

    @functools.cached_property
    def model(self) -> Any:
        """The model with the entry's weights, in eval mode, loaded strictly by timm."""
        overlay = dict(file=str(self.weights))
        return timm.create_model(self.name, pretrained=True, pretrained_cfg_overlay=overlay).eval()

    def files(self) -> dict[str, bytes]:
        """Content of all files of the repository except the weights, by name."""
        return {
            'config.json': self._config(),
            'README.md': self._card(ORGANIZATION).encode(),
            TENSORS: save(outputs(self.model, fixed_input(self.model)), metadata={'format': 'pt'}),
        }

    def yaml(self, files: dict[str, bytes]) -> str:
        """Text of entry.yaml: digests, pinned commit and results."""
        cfg = timm.get_pretrained_cfg(self.name)
        return yaml.safe_dump(dict(
            repo_id=f'{ORGANIZATION}/{self.name}',
            revision=self.record.get('revision'),
            files={
                WEIGHTS_NAME: dict(size=self.record['size'], sha256=self.record['sha256']),
                **{name: dict(size=len(data), sha256=hashlib.sha256(data).hexdigest())
                   for name, data in files.items() if name != TENSORS},
            },
            license=cfg.license,
            paper_ids=cfg.paper_ids,
            metrics={key: self.record[key] for key in ('top1', 'top5', 'images')},
            dataset=self.results['dataset']['name'],
            recipe=self.results['recipe']['config'],
            expected=dict(
                seed=SEED, logits=[round(x, 4) for x in load(files[TENSORS])['output'][0, :5].tolist()]),
        ), sort_keys=False)

    def problems(self) -> Iterator[str]:
        """Differences of the entry's folder and weights from the registry and the record."""
        if not self.weights.is_file():
            yield f'{self.weights.name} is missing'
            return
        data = self.weights.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if (len(data), digest) != (self.record['size'], self.record['sha256']):
            yield (
                f'{self.weights.name} has {len(data)} bytes and SHA-256 {digest}, '
                f'recorded are {self.record["size"]} and {self.record["sha256"]}'
            )
            return
        files = self.files()
        for name, wanted in {**files, 'entry.yaml': self.yaml(files).encode()}.items():
            path = self.folder / name
            if not path.is_file():
                yield f'{name} is missing'
            elif name == TENSORS:
                yield from differences(load_file(path), load(wanted))
            elif name == 'entry.yaml':
                held, made = (yaml.safe_load(text) for text in (path.read_bytes(), wanted))
                expected = [torch.tensor(each.pop('expected')['logits']) for each in (held, made)]
                if held != made or not close(*expected):
                    yield f'{name} is not what the registry gives'
            elif path.read_bytes() != wanted:
                yield f'{name} is not what the registry gives'
        known = {*files, 'entry.yaml', WEIGHTS_NAME}
        for path in sorted(self.folder.rglob('*')):
            if path.is_file() and path.relative_to(self.folder).as_posix() not in known:
                yield f'{path.relative_to(self.folder)} belongs to no entry'

    def write(self) -> None:
        """Write all files of the entry's folder."""
        files = self.files()
        for name, data in {**files, 'entry.yaml': self.yaml(files).encode()}.items():
            write(self.folder / name, data)

    def repository(self, organization: str = ORGANIZATION) -> dict[str, Path | bytes]:
        """All files of the repository by name, weights included, with the card for `organization`.

        Raises:
            EntryError: The entry's folder or weights are not what they should be.
        """
        problems = list(self.problems())
        if problems:
            raise EntryError('; '.join(problems))
        return {
            **{name: self.folder / name for name in ('config.json', TENSORS)},
            'README.md': self._card(organization).encode(),
            WEIGHTS_NAME: self.weights,
        }

    def export(self, folder: Path) -> None:
        """Write the whole repository, weights included, into a new folder.

        Raises:
            EntryError: The folder exists already, or the entry is not what it should be.
        """
        if folder.exists():
            raise EntryError(f'{folder} exists already')
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.') as temporary:
            whole = Path(temporary) / self.name
            for name, source in self.repository().items():
                write(whole / name, content(source))
            whole.rename(folder)

    def pin(self, revision: str) -> None:
        """Record the commit of the published repository, here and in the folder."""
        self.record['revision'] = revision
        write(self.results_path, (json.dumps(self.results, indent=2) + '\n').encode())
        write(self.folder / 'entry.yaml', self.yaml(self.files()).encode())

    def _config(self) -> bytes:
        config = hub_config(self.model, label_names=self.model.pretrained_cfg['label_names'])
        config['pretrained_cfg'].pop('label_names', None)  # stands above
        return (json.dumps(config, indent=2) + '\n').encode()

    def _card(self, organization: str) -> str:
        cfg, record, dataset = timm.get_pretrained_cfg(self.name), self.record, self.results['dataset']
        family = family_of(self.arch)
        _, *provenance = (inspect.getdoc(sys.modules[type(self.model).__module__]) or '').split('\n\n')
        metrics = [
            dict(type='accuracy', name=f'Top-{k}', value=record[f'top{k}']) for k in (1, 5)]
        front = dict(
            tags=['image-classification', 'timm', 'timm-gsa'],
            library_name='timm',
            pipeline_tag='image-classification',
            license=cfg.license,
            datasets=[dataset['hub']],
            **{'model-index': [dict(name=self.name, results=[dict(
                task=dict(type='image-classification', name='Image Classification'),
                dataset=dict(type=dataset['hub'], name=dataset['name'], split=dataset['split']),
                metrics=metrics,
            )])]},
        )
        return CARD.format(
            front=yaml.safe_dump(front, sort_keys=False).strip(),
            name=self.name,
            arch=self.arch,
            organization=organization,
            dataset=dataset['name'],
            split=dataset['split'],
            tar=dataset['tar'],
            dataset_citation=dataset['citation'],
            provenance='\n\n'.join(provenance),
            parameters=record['parameters'] / 1e6,
            size=cfg.input_size[1],
            paper=f'https://arxiv.org/abs/{family.arxiv}',
            classes=cfg.num_classes,
            features=self.model.num_features,
            sha256=record['sha256'],
            top1=record['top1'],
            top5=record['top5'],
            images=record['images'],
            train='\n    '.join(self.results['recipe']['train']).replace('NAME', self.arch),
            machine=self.results['recipe']['machine'],
            versions=', '.join(f'{library} {version}' for library, version in record['trained_with'].items()),
            note=f' This run was {record["note"]}.' if 'note' in record else '',
            curve=_curve(record['curve']) if 'curve' in record else '',
            citation=family.bibtex,
        )


def _curve(points: list[dict[str, float]]) -> str:
    """Table of a training, a row for each validation."""
    rows = [
        f'| {point["epoch"]:g} | {point["lr"]:.1e} | {point["train_loss"]:.3f} | {point["eval_loss"]:.3f} '
        f'| {point["eval_top1"]:.2f} | {point["eval_top5"]:.2f} |' for point in points]
    return '\n'.join([
        '',
        'Validations during training, of the weights before averaging, at the size that the recipe has for them:',
        '',
        '| epochs of the recipe, over all stages | learning rate | training loss | loss | top-1 | top-5 |',
        '| ---: | ---: | ---: | ---: | ---: | ---: |',
        *rows,
        '',
    ])


def content(source: Path | bytes) -> bytes:
    """Content of a file of a repository."""
    return source.read_bytes() if isinstance(source, Path) else source


def all_entries() -> list[str]:
    """Names of all entries for which results are recorded."""
    names: list[str] = []
    for path in sorted(PACKAGED.glob('*.json')):
        models = json.loads(path.read_text(encoding='utf-8'))['models']
        names += [name for name in models if name.endswith(f'.{path.stem}')]
    return names


def fixed_input(model: Any) -> torch.Tensor:
    """Two random images of the model's input size, equal on every machine."""
    return torch.randn((2, *model.pretrained_cfg['input_size']), generator=torch.Generator().manual_seed(SEED))


@torch.inference_mode()
def outputs(model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Images, features, pooled features and logits, under the names of timm's test vectors."""
    features = model.forward_features(images)
    return {
        'input': images,
        'features': features.contiguous(),  # of sMLPNet channels_last
        'pre_logits': model.forward_head(features, pre_logits=True),
        'output': model.forward_head(features),
    }


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """True if two tensors agree within the tolerance of timm's test vectors."""
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-3, atol=1e-3)


def differences(held: dict[str, torch.Tensor], made: dict[str, torch.Tensor]) -> Iterator[str]:
    """Differences between stored test vectors and the model's outputs."""
    for name in sorted({*held, *made}):
        if name not in held or name not in made:
            yield f'{TENSORS}: {name} is {"missing" if name in made else "unknown"}'
        elif not close(held[name], made[name]):
            yield f'{TENSORS}: {name} is not what the weights give'


def write(path: Path, data: bytes) -> None:
    """Write a file and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_bytes(data)


def front_matter(card: str) -> dict[str, Any]:
    """Front matter of a model card as huggingface_hub reads it."""
    return ModelCard(card).data.to_dict()


CARD = """---
{front}
---
# Model card for {name}

A `{arch}` trained on {dataset}, from timm-gsa: attention networks and rivals as timm models.

## Model Details

- **Model Type:** image classification, feature backbone
- **Model Stats:**
  - Params (M): {parameters:.2f}
  - Image size: {size} x {size}
  - Classes: {classes}
- **Paper:** {paper}
- **Dataset:** {dataset}
- **Weights:** `model.safetensors`, SHA-256 `{sha256}`

### What is verified, what is reconstruction

{provenance}

## Model Usage

    pip install timm-gsa

### Image Classification

```python
from PIL import Image
import timm
import timm_gsa  # registers the models, where importing timm alone does not

image = Image.open('photo.jpg').convert('RGB')
model = timm.create_model('hf-hub:{organization}/{name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
probabilities = model(transform(image).unsqueeze(0)).softmax(1)
best = probabilities.topk(5)
names = [model.pretrained_cfg['label_names'][i] for i in best.indices[0]]
```

### Feature Map Extraction

```python
model = timm.create_model('hf-hub:{organization}/{name}', pretrained=True, features_only=True).eval()
for feature in model(transform(image).unsqueeze(0)):
    print(feature.shape)  # strides 2 to 32
```

### Image Embeddings

```python
model = timm.create_model('hf-hub:{organization}/{name}', pretrained=True, num_classes=0).eval()
embedding = model(transform(image).unsqueeze(0))  # (1, {features})
```

## Results

| data | images | top-1 | top-5 |
| --- | ---: | ---: | ---: |
| {dataset} {split} | {images} | {top1} | {top5} |

Measured in float32 as by

    python pytorch-image-models/validate.py --model {arch} --pretrained --data-dir DIR --split {tar}

and trained by

    {train}

on {machine}, with {versions}; one run.{note}
{curve}
## Citation

```bibtex
{citation}
```

{dataset}: {dataset_citation}.
"""
