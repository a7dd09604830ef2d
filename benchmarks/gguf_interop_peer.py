"""Runs in the Python that has llama-cpp-python: a GGUF file's tokens for texts, and greedy continuations of prompts.

Reads one JSON object from standard input and writes one to standard output.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from typing import Any

import llama_cpp

_F32 = 0  # ggml's number; the cache is float16 otherwise


def main() -> None:
    asked: dict[str, Any] = json.load(sys.stdin)
    model = llama_cpp.Llama(
        asked["model"],
        n_ctx=512,
        n_threads=asked["threads"],
        n_threads_batch=asked["threads"],
        type_k=_F32,
        type_v=_F32,
        verbose=False,
    )
    said = {
        "version": llama_cpp.__version__,
        "texts": [
            [model.tokenize(text.encode(), add_bos=False, special=special) for special in (False, True)]
            for text in asked["texts"]
        ],
        "replies": [list(islice(model.generate(ids, temp=0.0), asked["tokens"])) for ids in asked["prompts"]],
        "ends": [i for i in asked["ends"] if llama_cpp.llama_vocab_is_eog(model._model.vocab, i)],
    }
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
