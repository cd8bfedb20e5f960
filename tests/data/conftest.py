"""What the tests of the data modules share: odd text, a tokenizer that drops white space, and arrays in files."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_bigmodels.data.token_cache import ArrayFile

ODD_TEXT = (
    "Plain words.\nA new line, then two.\n\nTabs\tand  spaces \n trailing.\r\nCRLF\r\n\r\nblank\n\n\n\n  indented\n"
    "naïve café, Ελληνικά, русский, 日本語の文章\nemoji 👩‍👩‍👧 🇫🇷 ok\n\x85next\u2028line\u00a0nbsp\n\x1cfile\n"
    "it's\n'quoted'\n's\n123\n456 7\n...\n--\n<|endoftext|>\nend"
)


@pytest.fixture
def odd_text():
    return ODD_TEXT


@pytest.fixture(scope="session")
def word_pieces():
    """WordPiece that lower-cases and drops white space: no byte-level tokenizer, not lossless."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=20))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[END]"], show_progress=False)
    backend.train_from_iterator([ODD_TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]")


@pytest.fixture
def array_file(tmp_path):
    def write(values, dtype="uint32"):
        path = tmp_path / f"array{len(list(tmp_path.iterdir()))}.bin"
        np.asarray(values, dtype).tofile(path)
        return ArrayFile(path, dtype)

    return write
