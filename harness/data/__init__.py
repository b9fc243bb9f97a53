"""Text for pre-training: sources, the split into training and validation, the tokenizer, the token
cache, and the batches cut from it. `prepare` goes from a source string to tokens on disk."""

from harness.data.dataset import TokenDataset, find, prepare, stats
from harness.data.sources import SourceError

__all__ = ["SourceError", "TokenDataset", "find", "prepare", "stats"]
