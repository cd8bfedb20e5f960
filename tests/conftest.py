"""What many tests share: a small real text, a tiny network, a cache that no test leaves behind."""

import os
import sys
from pydoc_data.topics import topics

import pytest

from tests.forked_python import serving
from tests.sharing import Sharing, place_of

# networks of a few kilobytes run fastest on one thread, here and in the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"

TINY_LLAMA = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


# what a Trainer in a test leaves out, on a CPU for a few steps
QUIET = {
    "accelerator": "cpu",
    "max_steps": 4,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Share the suite out as `tests/sharing.py` says."""
    return Sharing(config, log)


def pytest_collection_modifyitems(items):
    """Begin with what takes longest."""
    items.sort(key=lambda item: place_of(item.nodeid))


def pytest_collection_finish():
    """Have the first backward pass before any test exports a network, so that forked processes have theirs.

    torch.export registers a device of its own, for which the first pass after it starts threads; in a fork none would
    run. Before, a pass starts none (torch 2.14).
    """
    if "torch" in sys.modules:
        sys.modules["torch"].ones(1, requires_grad=True).sum().backward()


@pytest.fixture(scope="session")
def python():
    """The path of a Python for the command in processes of its own, which start at once."""
    with serving() as executable:
        yield executable


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A file with about 30 kB of the language reference."""
    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics))[:30_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Token caches of the session."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def text(text_file, cache_dir):
    """Return a function that builds `Text` on the small file, with `changes`."""
    from lightning_bigmodels.data import Text

    def build(**changes):
        values = {
            "sources": str(text_file),
            "vocab_size": 300,
            "block_size": 32,
            "batch_size": 8,
            "cache_dir": cache_dir,
        }
        return Text(**{**values, **changes})

    return build


@pytest.fixture
def trainer(tmp_path):
    """Return a function that builds a quiet single-process Trainer, with `changes`."""
    from lightning.pytorch import Trainer

    def build(**changes):
        values = {**QUIET, "devices": 1, "limit_val_batches": 2, "default_root_dir": tmp_path}
        return Trainer(**{**values, **changes})

    return build
