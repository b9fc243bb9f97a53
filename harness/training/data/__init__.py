"""Text for pre-training: sources, the split into training and validation, the tokenizer, the token
cache, and the batches cut from it. `prepare` goes from a source string to tokens on disk."""

from harness.training.data.dataset import TokenDataset, find, prepare, stats
from harness.training.data.sources import SourceError

__all__ = ["SourceError", "TokenDataset", "find", "prepare", "stats"]
