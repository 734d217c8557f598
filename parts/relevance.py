"""The relevance model M: a sentence encoder whose raw dot products the proxy reward is made of, and a store of its embeddings."""

from __future__ import annotations

import functools
import hashlib
import math
import sqlite3
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from parts.batching import batches_by_length
from parts.cpu_speed import most_tokens, use_onednn
from parts.errors import InputError
from parts.models import loading

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHARACTERS_PER_TOKEN = 4


def load_encoder(name_or_path: str, device: str | None = None, cache_dir: str | None = None) -> SentenceTransformer:
    """A sentence encoder in fp32 with mean pooling over the mask, no normalisation, texts truncated on the left.

    The two modules are built here because the settings that some models ship (normalise, cut at 256 tokens) change the dot
    product that the method is defined with.

    Raises:
        InputError: the model cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    hub = {"trust_remote_code": False} | ({"cache_dir": cache_dir} if cache_dir else {})
    with loading(name_or_path, "a relevance model"):
        transformer = Transformer(
            name_or_path,
            model_kwargs={**hub, "dtype": torch.float32},
            processor_kwargs={**hub, "truncation_side": "left"},
            config_kwargs=hub,
        )
    use_onednn(transformer.auto_model.requires_grad_(False))
    limit = transformer.tokenizer.model_max_length
    transformer.max_seq_length = min(limit, getattr(transformer.auto_model.config, "max_position_embeddings", limit))
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")], device=device)


class EmbeddingStore:
    """Embeddings by text, in an SQLite file that is read through a memory map.

    Args:
        path: a file to keep them in over runs and processes; empty means a private one that lives in memory, spills to disk
            where it grows large, and ends with the process.
        model: what the embeddings depend on besides the text; other models' rows in the same file are never seen.

    Raises:
        InputError: `path` is not such a file.
    """

    def __init__(self, path: str, model: str) -> None:
        self.model = model
        self.writing = threading.Lock()  # some trainers call their reward functions from worker threads
        try:
            self.database = sqlite3.connect(path, timeout=60, check_same_thread=False)
            self.database.execute("PRAGMA mmap_size = 1073741824")
            self.database.execute("CREATE TABLE IF NOT EXISTS embedding (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
        except sqlite3.Error as error:
            raise InputError(f"{path}: cannot be used as an embedding cache ({error})") from None

    def close(self) -> None:
        self.database.close()

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.model}\0{text}".encode("utf-8", "surrogatepass")).digest()

    def get(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """One float32 [dimension] array a text, None where it is not here yet."""
        found = (self.database.execute("SELECT vector FROM embedding WHERE key = ?", (self._key(text),)).fetchone() for text in texts)
        return [np.frombuffer(row[0], dtype=np.float32) if row else None for row in found]

    def put(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Keep [texts, dimension] float32 embeddings, all or none of them."""
        rows = [(self._key(text), vector.tobytes()) for text, vector in zip(texts, vectors)]
        with self.writing, self.database:  # one transaction
            self.database.executemany("INSERT OR IGNORE INTO embedding VALUES (?, ?)", rows)


class RelevanceModel:
    """M, from texts to embeddings. The encoder loads with the first of them, or by `load` before.

    Args:
        name_or_path: hub name or folder.
        device: the best there is by default.
        batch_size: most texts per forward pass.
        cache_dir: where hub downloads are kept.
        embedding_cache: file of an `EmbeddingStore`; empty means one that ends with the process.
    """

    def __init__(
        self,
        name_or_path: str,
        device: str | None = None,
        batch_size: int = 32,
        cache_dir: str | None = None,
        embedding_cache: str = "",
    ) -> None:
        self.batch_size = batch_size
        self._how = (name_or_path, device, cache_dir)
        self._embedding_cache = embedding_cache

    def load(self) -> None:
        """Load the encoder and open the cache. Raises InputError where the one cannot be loaded, or the other is none."""
        self.store, self.encoder  # noqa: B018 - made when they are first asked for

    @functools.cached_property
    def encoder(self) -> SentenceTransformer:
        return load_encoder(*self._how)

    @functools.cached_property
    def store(self) -> EmbeddingStore:
        return EmbeddingStore(self._embedding_cache, self._fingerprint() if self._embedding_cache else "")

    def _fingerprint(self) -> str:
        """Names the weights themselves: a folder's name stays when its model changes."""
        digest = hashlib.sha256(f"{self.encoder.max_seq_length} {self.encoder.tokenizer.truncation_side}".encode())
        for name, weight in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """[texts, dimension] float32 on the CPU. The empty text has an embedding too, that of its special tokens alone."""
        embeddings = torch.empty(len(texts), self.encoder.get_embedding_dimension())
        for rows in self.batches(texts):
            embeddings[rows] = self._encode([texts[row] for row in rows])
        return embeddings

    def embed_once(self, texts: Sequence[str]) -> torch.Tensor:
        """As `embed`, for texts that come again (queries, references): each is computed once and looked up from then on."""
        known = dict(zip(texts, self.store.get(texts)))
        new = [text for text, vector in known.items() if vector is None]
        if new:
            vectors = self.embed(new).numpy()
            self.store.put(new, vectors)
            known.update(zip(new, vectors))
        return torch.from_numpy(np.stack([known[text] for text in texts]))

    def batches(self, texts: Sequence[str]) -> list[list[int]]:
        """Row numbers in batches of texts of about the same length: at most `batch_size` rows and as many tokens as suit the device."""
        lengths = [len(text) / CHARACTERS_PER_TOKEN for text in texts]
        tokens = most_tokens(math.inf, self.encoder.device)
        return batches_by_length(lengths, self.batch_size, tokens, cut_at=self.encoder.max_seq_length)

    def _encode(self, texts: list[str]) -> torch.Tensor:
        return self.encoder.encode(texts, batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False).float().cpu()
