"""The command line as a whole: its help, its examples and its errors."""
import re
import shlex
import subprocess
import sys

import pytest

from timm_gsa.commands import commands, main, make_parser
from timm_gsa.models._families import FAMILIES

NAMES = ('attention-maps', 'classify', 'convert-san', 'demo', 'models', 'positions')


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit, match='0'):
        main([*arguments, '--help'])
    return capsys.readouterr().out


def test_help_lists_every_command(capsys):
    assert set(NAMES) <= set(commands())
    listed = help_of(capsys)
    for name in commands():
        assert re.search(rf'^ +{name}\b', listed, re.MULTILINE)


@pytest.mark.parametrize('name', NAMES)
def test_help_of_a_command_shows_examples_that_its_parser_takes(name, capsys):
    text = help_of(capsys, name)
    examples = re.findall(r'^ *timm-gsa (.+)$', text, re.MULTILINE)
    assert examples
    for example in examples:
        assert make_parser().parse_args(shlex.split(example)).command.prog == f'timm-gsa {name}'
    assert '/photos' not in text  # no path of this machine


@pytest.mark.parametrize('arguments', [[], ['no-such-command'], ['classify', '--no-such-option']])
def test_wrong_command_line_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit, match='2'):
        main(arguments)
    assert 'usage: timm-gsa' in capsys.readouterr().err


def test_package_runs_as_a_module_in_any_folder(tmp_path):
    line = [sys.executable, '-m', 'timm_gsa', 'models', 'priorattn_resnet_tiny']
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r'^priorattn_resnet_tiny +64 +1,020,091 +25\.8 M +in the package \(c100\)$', done.stdout, re.M)
    assert not list(tmp_path.iterdir())


def test_models_lists_what_the_patterns_match(capsys):
    assert main(['models', 'san1?_p*', 'gsa_resnet_tiny']) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ['model', 'san10_pairwise', 'san10_patchwise', 'san15_pairwise', 'san15_patchwise',
                     'san19_pairwise', 'san19_patchwise', 'gsa_resnet_tiny']
    with pytest.raises(SystemExit, match='2'):
        main(['models', 'resnet50'])
    assert "'resnet50' matches none of gsa_resnet" in capsys.readouterr().err


def test_models_says_where_weights_come_from(capsys):
    assert main(['models', 'san10_pairwise', 'gsa_resnet26']) == 0
    _, gsa, san = capsys.readouterr().out.splitlines()
    assert gsa.endswith(' -') and san.endswith(next(family.weights for family in FAMILIES if family.name == 'san'))
