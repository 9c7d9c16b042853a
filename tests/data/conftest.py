from __future__ import annotations

import random
from pathlib import Path

import pytest

from data.config import DataConfig, TokenizerConfig
from data.prepare import prepare
from data.prepared import Prepared


def write_texts(folder: Path, count: int, seed: int = 0, words: int = 200) -> None:
    """Small synthetic documents that share a lexicon, so that a tiny vocabulary can be learned from them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(60)]
    for number in range(count):
        lines = (" ".join(rng.choices(lexicon, k=8)) for _ in range(rng.randint(1, words // 8)))
        (folder / f"{number:03d}.txt").write_text(f"{number} é 🙂\n" + "\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def texts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "first"
    write_texts(folder, 30)
    write_texts(folder.parent / "second", 12, seed=1)
    return folder


@pytest.fixture(scope="session")
def text_config(texts_folder: Path) -> DataConfig:
    return DataConfig(path=f"{texts_folder}/*.txt", validation_fraction=0.2, tokenizer=TokenizerConfig(vocab_size=330))


@pytest.fixture(scope="session")
def prepared(text_config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(text_config, tmp_path_factory.mktemp("artifacts"), shard_tokens=1500)


@pytest.fixture(scope="session")
def prepared_mixture(texts_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    second = texts_folder.parent / "second"
    config = DataConfig(
        mixture={f"files:{texts_folder}": 0.7, f"files:{second}": 0.3},
        validation_fraction=0.2,
        tokenizer=TokenizerConfig(vocab_size=330),
    )
    return prepare(config, tmp_path_factory.mktemp("artifacts"))
