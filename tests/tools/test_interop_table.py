"""The table of other libraries: made of a report of pytest."""
from pathlib import Path
from xml.sax.saxutils import quoteattr

import interop_table
import pytest
from _sections import Section

TOOLS = Path(interop_table.__file__).parent
MODELS = list(interop_table.MODELS)
HEAD = '| library | version | what was done | models | result |\n| --- | --- | --- | --- | --- |\n'


def case(library=None, did='`run`', model='gsa_resnet_tiny', version='1.0', result=None, outcome='', line=0):
    """A test in a report."""
    cells = dict(library=library, version=version, did=did, model=model, result=result) if library else {}
    properties = ''.join(
        f'<property name="{name}" value={quoteattr(value)}/>' for name, value in cells.items() if value is not None)
    name = f'classname="tests.interop" name="test_{library}" file="tests/test_it.py" line="{line}"'
    return f'<testcase {name}><properties>{properties}</properties>{outcome}</testcase>'


@pytest.fixture
def report(tmp_path):
    """Writes a report of tests."""
    def report(*cases):
        path = tmp_path / 'report.xml'
        path.write_text(f'<testsuites><testsuite>{"".join(cases)}</testsuite></testsuites>')
        return path
    return report


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """A README with nothing between the markers, in the place of the real one."""
    path = tmp_path / 'README.md'
    path.write_text('before\n<!-- table -->\n<!-- end of table -->\nafter\n')
    monkeypatch.setattr(interop_table, 'SECTION', Section(path, 'table'))
    return path


def test_tests_that_agree_share_a_row(report):
    assert interop_table.table(report(*[case('a', model=model) for model in MODELS])) == (
        HEAD + '| a | 1.0 | `run` | all | works untouched |')


def test_results_that_differ_are_rows_of_their_families(report):
    path = report(*[
        case('a', model=model, result='needs `x | y`' if 'gsa' in model else None) for model in reversed(MODELS)])
    others = ', '.join(f'`{model}`' for model in MODELS if 'gsa' not in model)
    assert interop_table.table(path) == (
        HEAD + f'| a | 1.0 | `run` | {others} | works untouched |\n'
        r'| a | 1.0 | `run` | `gsa_resnet_tiny` | needs `x \| y` |')


def test_rows_go_by_library_then_as_the_tests_ran(report):
    path = report(
        case('b', 'z'), case('B', 'a'), case('a', 'late'), case('b', 'z', 'san_tiny_pairwise', result='needs'))
    rows = interop_table.table(path).splitlines()[2:]
    assert [row.split(' | ')[2] for row in rows] == ['late', 'z', 'z', 'a']


def test_rows_keep_the_order_of_the_tests_when_several_processes_ran_them(report):
    path = report(case('a', 'third', line=100), case('a', 'second', line=99), case('a', 'first', line=8))
    rows = interop_table.table(path).splitlines()[2:]
    assert [row.split(' | ')[2] for row in rows] == ['first', 'second', 'third']


def test_missing_library_is_said_so(report):
    path = report(case('a', version='', outcome='<skipped message="a is not installed"/>'), case('b'))
    assert interop_table.table(path) == (
        HEAD + '| a |  | `run` | `gsa_resnet_tiny` | not run: a is not installed |\n'
        '| b | 1.0 | `run` | `gsa_resnet_tiny` | works untouched |')


@pytest.mark.parametrize('outcome', ['<failure message="x"/>', '<error message="x"/>'])
def test_failed_test_leaves_the_readme_alone(report, readme, outcome, capsys):
    before = readme.read_text()
    assert interop_table.main(['--write', '--junit', str(report(case('a'), case('b', outcome=outcome)))]) == 1
    assert 'tests.interop.test_b failed' in capsys.readouterr().err
    assert readme.read_text() == before


def test_report_without_rows_is_an_error(report, capsys):
    assert interop_table.main(['--junit', str(report(case()))]) == 1
    assert 'no test recorded a row' in capsys.readouterr().err


@pytest.mark.parametrize('outcome', ['', '<skipped message="too old"/>'])
def test_test_without_a_row_is_passed_over(report, outcome):
    path = report(case('a'), case(outcome=outcome))
    assert interop_table.table(path) == HEAD + '| a | 1.0 | `run` | `gsa_resnet_tiny` | works untouched |'


def test_write_then_check(report, readme, capsys):
    written = str(report(case('a')))
    assert interop_table.main(['--check', '--junit', written]) == 1
    assert interop_table.main(['--write', '--junit', written]) == 0
    assert readme.read_text() == (
        f'before\n<!-- table -->\n{interop_table.table(Path(written))}\n<!-- end of table -->\nafter\n')
    assert interop_table.main(['--check', '--junit', written]) == 0
    assert interop_table.main(['--check', '--junit', str(report(case('a', version='2.0')))]) == 0
    capsys.readouterr()
    assert interop_table.main(['--check', '--junit', str(report(case('a', result='needs more')))]) == 1
    assert 'renew it with --write' in capsys.readouterr().out
    assert interop_table.main(['--check', '--junit', str(report(case('a', did='`walk`')))]) == 1


def test_readme_without_markers_is_an_error(report, readme):
    readme.write_text('<!-- table -->\n')
    with pytest.raises(ValueError, match='README.md must hold the lines .*end of table'):
        interop_table.main(['--write', '--junit', str(report(case('a')))])


def test_model_of_no_family_is_an_error(record_property):
    with pytest.raises(ValueError, match='model must be one of gsa_resnet_tiny, .*, got resnet26'):
        interop_table.record(record_property, 'a', '`run`', 'resnet26')


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a test of a library that is there, one of a library that is not, and one of another kind."""
    (tmp_path / 'pytest.ini').write_text(f'[pytest]\nmarkers = interop\npythonpath = {TOOLS}\n')
    (tmp_path / 'test_it.py').write_text("""
import interop_table
import pytest

@pytest.mark.interop
@pytest.mark.parametrize('library', ['pytest', 'no-such-library'])
def test_library(library, record_property):
    interop_table.record(record_property, library, '`run`', 'gsa_resnet_tiny')
    pytest.importorskip(library, reason=f'{library} is not installed')
    record_property('result', 'needs nothing')

def test_other():
    raise AssertionError
""")
    (tmp_path / 'conftest.py').write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--slow', action='store_true')\n")
    monkeypatch.setattr(interop_table, 'ROOT', tmp_path)
    return tmp_path


@pytest.mark.slow
def test_runs_the_tests_itself(project, readme):
    assert interop_table.main(['--write']) == 0
    assert readme.read_text().splitlines()[4:6] == [
        '| no-such-library |  | `run` | `gsa_resnet_tiny` | not run: no-such-library is not installed |',
        f'| pytest | {pytest.__version__} | `run` | `gsa_resnet_tiny` | needs nothing |',
    ]
    (project / 'test_it.py').write_text('import pytest\n@pytest.mark.interop\ndef test_it():\n    assert False\n')
    before = readme.read_text()
    assert interop_table.main(['--write']) == 1
    assert readme.read_text() == before


def test_readme_names_every_library():
    rows = interop_table.SECTION.read().splitlines()[2:]
    assert {row.split(' | ')[0].removeprefix('| ') for row in rows} == {
        'accelerate', 'fastai', 'grad-cam', 'lightning', 'onnxruntime', 'safetensors', 'segmentation-models-pytorch',
        'torchvision', 'transformers'}
    assert all(len(row.split(' | ')) == 5 and row.split(' | ')[1] for row in rows)
