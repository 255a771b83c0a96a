"""A run in which all that the predictions say is so."""

import pytest

from tests.tell_core.analysis.small_runs import QUANTUM, run_spec, write_run


@pytest.fixture(scope="session")
def quantum_run(tmp_path_factory: pytest.TempPathFactory):
    """The run, its cells and its directory."""
    root = tmp_path_factory.mktemp("quantum")
    run, cells = write_run(root, run_spec(), QUANTUM)
    return run, cells, root
