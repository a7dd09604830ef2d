"""Tokenizers: text to ids and back, from model directories and GGUF files, without torch or Transformers."""

from __future__ import annotations

from hanlin.tokenizers.detokenizer import StreamDetokenizer
from hanlin.tokenizers.gguf import from_gguf
from hanlin.tokenizers.hf import HFTokenizer
from hanlin.tokenizers.loading import load_tokenizer
from hanlin.tokenizers.spm import SentencePieceTokenizer

__all__ = ["HFTokenizer", "SentencePieceTokenizer", "StreamDetokenizer", "from_gguf", "load_tokenizer"]
