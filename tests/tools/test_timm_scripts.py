"""timm's own train.py and validate.py, unmodified, on a model of this package and a folder of photos."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from timm_gsa.commands import main

TIMM_REPO = os.environ.get('TIMM_REPO', '')

pytestmark = pytest.mark.skipif(not TIMM_REPO, reason="TIMM_REPO does not name a checkout with timm's real scripts")


def script(name, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, str(Path(TIMM_REPO).resolve() / f'{name}.py'), *map(str, arguments)], cwd=cwd,
        env={**os.environ, 'HF_HUB_OFFLINE': '1'}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_model_is_trained_validated_and_used_on_a_folder_of_photos(tmp_path, capsys, monkeypatch):
    for split in ('train', 'val'):
        for label in ('black', 'white'):
            folder = tmp_path / 'photos' / split / label
            folder.mkdir(parents=True)
            for number in range(8):
                Image.effect_noise((64, 64), 20).point(
                    lambda value, label=label: value // 4 + (180 if label == 'white' else 10)
                ).convert('RGB').save(folder / f'{number}.png')
    common = ('--model', 'priorattn_resnet_tiny', '--num-classes', 2, '--data-dir', tmp_path / 'photos',
              '--device', 'cpu', '--batch-size', 8, '--workers', 1)
    said = script(
        'train', *common, '--pretrained', '--epochs', 2, '--opt', 'adamw', '--lr', 1e-3, '--warmup-epochs', 0,
        '--experiment', 'two', cwd=tmp_path)
    best = re.search(r'Best metric: ([\d.]+) \(epoch', said)
    checkpoint = tmp_path / 'output' / 'train' / 'two' / 'model_best.pth.tar'
    said = script('validate', *common, '--split', 'val', '--checkpoint', checkpoint, cwd=tmp_path)
    accuracy = re.search(r' \* Acc@1 ([\d.]+)', said)
    assert float(accuracy[1]) == pytest.approx(float(best[1]), abs=1e-2)

    monkeypatch.chdir(tmp_path)
    photo = tmp_path / 'photos' / 'val' / 'white' / '0.png'
    assert main([
        'classify', str(photo), '--model', 'priorattn_resnet_tiny', '--checkpoint', str(checkpoint),
        '--classes', str(tmp_path / 'photos' / 'train')]) == 0
    assert re.match(r'0\.png: (black|white) [\d.]+ %, (black|white) [\d.]+ %  -> ', capsys.readouterr().out)
    assert torch.load(checkpoint, weights_only=False)['arch'] == 'priorattn_resnet_tiny'
