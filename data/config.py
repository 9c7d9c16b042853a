"""DataConfig: which text, how it is tokenised and cut into rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from errors import InputError, require, require_choice, require_number

SOURCES = ("installed_python", "installed_cpp", "files", "huggingface", "megatron", "jsonl", "nlrx")
SOURCES_WITH_PATH = ("files", "huggingface", "megatron", "jsonl")
# Sources of prompts and answers: loss on the answers alone, a test split, rows of whole documents.
ANSWER_SOURCES = ("jsonl", "nlrx")
DEFAULT_SOURCE = "installed_python"


@dataclass(frozen=True)
class CorpusSpec:
    """One corpus of a run: where it comes from and its share of the rows (weights of a run sum to 1)."""

    source: str
    paths: tuple[str, ...]
    weight: float

    @property
    def label(self) -> str:
        """How people read it, and the key under which a mixture lists it."""
        return f"{self.source}:{','.join(self.paths)}" if self.paths else self.source


@dataclass
class TokenizerConfig:
    # Entries of the BPE vocabulary: 3 special ones (unknown, begin, end), 256 bytes, the rest learned.
    vocab_size: int = 4096
    # A sentencepiece model with an end token (eos), to use instead of training one: another run's, or the one that
    # made a megatron corpus, which cannot do without. Its vocabulary counts then; vocab_size is what the plan and
    # --dry-run reckon with.
    path: str | None = None
    # UTF-8 bytes of training text, drawn over the whole training split, that the vocabulary is learned from.
    sample_bytes: int = 10_000_000

    def validate(self, path: str) -> None:
        # sentencepiece: 3 special entries and 256 bytes, and at least one character
        require_number(f"{path}.vocab_size", self.vocab_size, 260, 2**24)
        require_number(f"{path}.sample_bytes", self.sample_bytes, 1)
        require(self.path is None or bool(self.path.strip()), f"{path}.path", "is empty; expected a file or null")


@dataclass
class NLRXConfig:
    # Different pairs of description and regex, over all splits. The generator has about 6,700 of one and two forms,
    # and far more of three.
    pairs: int = 10_000
    # Names the list of pairs; a longer list begins with the shorter one.
    seed: int = 0

    def validate(self, path: str) -> None:
        require_number(f"{path}.pairs", self.pairs, 10)
        require_number(f"{path}.seed", self.seed, 0)


@dataclass
class DataConfig:
    """Raises InputError from `validate` (values) and `corpora` (how source, path and mixture fit together)."""

    # installed_python | installed_cpp | files | huggingface | megatron | jsonl | nlrx. A data.path alone selects
    # `files`. jsonl: rows of "messages" with roles, or of "prompt" and "completion"; nlrx: generated pairs of a
    # description and its regex. These two bear loss on answers alone, and their pairs are never cut.
    source: str = DEFAULT_SOURCE
    # files: a path, folder or glob (.jsonl and .parquet by column, all else as UTF-8 text), or a list of them;
    # huggingface: data set name, or name/subset after a colon ("wikitext:wikitext-2-raw-v1"); megatron: prefix or
    # glob of .bin/.idx pairs.
    path: Any = None
    # Field (.jsonl) or column (.parquet, huggingface) that holds the text.
    text_field: str = "text"
    # Several corpora by share of rows, e.g. {installed_python: 0.7, installed_cpp: 0.3}. A key is a source, or
    # source:path for those that need a path ("files:my_texts/*.txt"). Replaces data.source when not empty.
    mixture: dict[str, float] = field(default_factory=dict)
    # Tokens per row (T). Longer documents continue in another row; shorter ones share a row.
    sequence_length: int = 256
    # Share of the text that is held out, by module (installed sources) or document, never by row.
    validation_fraction: float = 0.03
    # Share of the documents kept for scoring answers after training (jsonl and nlrx), by hash.
    test_fraction: float = 0.1
    # jsonl: a file or files of rows to score instead of a share; their prompts are left out of training.
    test_path: Any = None
    # Share of the training documents that is used, by hash: a smaller share is part of every larger one. Held-out
    # text and vocabulary stay the same.
    train_fraction: float = 1.0
    nlrx: NLRXConfig = field(default_factory=NLRXConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def validate(self, path: str = "data") -> None:
        require_choice(f"{path}.source", self.source, SOURCES)
        require_number(f"{path}.sequence_length", self.sequence_length, 2)
        require_number(f"{path}.validation_fraction", self.validation_fraction, 0.0, 0.5, exclusive=True)
        require_number(f"{path}.test_fraction", self.test_fraction, 0.0, 0.5)
        require_number(f"{path}.train_fraction", self.train_fraction, 0.0, 1.0, exclusive=True)
        require(bool(self.text_field), f"{path}.text_field", "is empty; expected the name of a field, e.g. text")
        self.tokenizer.validate(f"{path}.tokenizer")
        self.nlrx.validate(f"{path}.nlrx")
        sources = {spec.source for spec in self.corpora(path)}
        require(
            self.test_path is None or "jsonl" in sources, f"{path}.test_path", "is only read with data.source=jsonl"
        )
        self.test_paths(path)
        require(
            self.train_fraction == 1 or "megatron" not in sources,
            f"{path}.train_fraction",
            f"a megatron corpus is used whole; expected 1, got {self.train_fraction}",
        )
        require(
            self.tokenizer.path is not None or "megatron" not in sources,
            f"{path}.tokenizer.path",
            "is missing; a megatron corpus needs the sentencepiece model that made it, e.g. corpus/tokenizer.model",
        )

    def paths(self, path: str = "data") -> tuple[str, ...]:
        """data.path as a tuple of strings. Raises InputError."""
        return _strings(self.path, f"{path}.path")

    def test_paths(self, path: str = "data") -> tuple[str, ...]:
        """data.test_path as a tuple of strings. Raises InputError."""
        return _strings(self.test_path, f"{path}.test_path")

    def corpora(self, path: str = "data") -> list[CorpusSpec]:
        """The corpora with normalised weights, those of weight 0 left out. Raises InputError."""
        paths = self.paths(path)
        if not self.mixture:
            source = "files" if paths and self.source == DEFAULT_SOURCE else self.source
            return [self._spec(source, paths, 1.0, f"{path}.source", path)]
        for key, weight in self.mixture.items():
            require(  # a dotted override of a name with a dot makes a mapping
                isinstance(weight, (int, float)),
                f"{path}.mixture.{key}",
                f"expected a share (a number), got {weight}; a name with a dot is given in braces: "
                f"{path}.mixture='{{files:my_texts/*.txt: 0.3}}'",
            )
            require_number(f"{path}.mixture.{key}", weight, 0.0)
        total = sum(self.mixture.values())
        require(total > 0, f"{path}.mixture", "the weights sum to 0; expected at least one above 0")
        specs, used = [], False
        for key, weight in self.mixture.items():
            source, _, inline = key.partition(":")
            bare = source in SOURCES_WITH_PATH and not inline
            used = used or bare
            own = (inline,) if inline else (paths if bare else ())
            spec = self._spec(source, own, weight / total, f"{path}.mixture.{key}", path)
            if weight > 0:
                specs.append(spec)
        if paths and not used:
            raise InputError(
                f"{path}.path: no corpus of {path}.mixture takes it; list one of {', '.join(SOURCES_WITH_PATH)}"
            )
        return specs

    @staticmethod
    def _spec(source: str, paths: tuple[str, ...], weight: float, key: str, path: str) -> CorpusSpec:
        require_choice(key, source, SOURCES)
        if source in SOURCES_WITH_PATH:
            require(
                bool(paths), f"{path}.path", f"is missing; source {source} needs it, e.g. {path}.path=my_texts/*.txt"
            )
        else:
            require(not paths, key, f"source {source} takes no path; expected one of {', '.join(SOURCES_WITH_PATH)}")
        return CorpusSpec(source, paths, weight)


def _strings(value: Any, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not (isinstance(values, (list, tuple)) and all(isinstance(item, str) for item in values)):
        raise InputError(f"{key}: expected a string or a list of strings, got {value!r}")
    require(
        len(values) > 0 and all(item.strip() for item in values),
        key,
        "is empty; expected a file, folder or glob, e.g. my_texts/*.txt",
    )
    return tuple(values)
