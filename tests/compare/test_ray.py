"""Ray: a run survives the death of a node, and says in a sentence what it lacks."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from foveate.compare import compare
from foveate.errors import FoveateError

TASK = "perplexity:tokens=96,window=64,chunk=32"


def test_without_ray_there_is_a_sentence(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FoveateError, match=r"pip install 'foveate\[ray\]'"):
        compare(folder, ["full"], [TASK], ray="local", show=False)


def test_a_cluster_that_is_not_there_is_a_sentence(folder):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'foveate[ray]'")
    with pytest.raises(FoveateError, match="no Ray cluster"):
        compare(folder, ["full"], [TASK], ray="auto", show=False)


def test_a_node_that_dies_loses_no_cell(folder, plugin, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'foveate[ray]'")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    victim = cluster.add_node(**node)
    go = tmp_path / "go"

    def kill_a_node_while_both_are_at_work():
        end = time.monotonic() + 90
        while len(list(tmp_path.glob("go.*"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        cluster.remove_node(victim, allow_graceful=False)
        go.touch()

    killer = threading.Thread(target=kill_a_node_while_both_are_at_work)
    killer.start()
    waits = f"mischief:how=wait,file={go}"
    recipes = [waits, f"{waits}+window:entries=32", "full", "window:entries=16"]
    try:
        done = compare(folder, recipes, [TASK], out=tmp_path / "run", ray=cluster.address, show=False)
    finally:
        killer.join()
        cluster.shutdown()
    assert [cell["status"] for cell in done.cells] == ["ok"] * 4, done.failed
    assert len(list(tmp_path.glob("go.*"))) == 3  # one of the two that waited was started again
    assert not ray.is_initialized()
    here = compare(folder, ["window:entries=16"], [TASK], show=False)
    assert done.cells[3]["metrics"] == here.cells[0]["metrics"]
