"""Hanlin's models as Transformers classes. Importing this registers them with the Auto classes:

    import hanlin.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

No code from a model's directory or repository runs, with `trust_remote_code` or without.
"""

from __future__ import annotations

from hanlin.errors import need

need("transformers", extra="hf", feature="hanlin.hf")

from hanlin.hf.chatglm import (  # noqa: E402 - after the check, whose message says what to install
    CHATGLM,
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    ChatGLMModel,
    ChatGLMTokenizer,
)
from hanlin.hf.chatglm2 import CHATGLM2  # noqa: E402
from hanlin.hf.chatglm2_tokenizer import ChatGLM4Tokenizer  # noqa: E402
from hanlin.hf.gpus import load_model_on_gpus  # noqa: E402
from hanlin.hf.internlm2 import (  # noqa: E402
    FAMILY,
    InternLM2Config,
    InternLM2ForCausalLM,
    InternLM2ForRewardModel,
    InternLM2ForSequenceClassification,
    InternLM2Model,
    InternLM2Tokenizer,
    InternLM2TokenizerFast,
)
from hanlin.hf.llama import (  # noqa: E402
    INTERNLM,
    INTERNLM3,
    InternLM3Config,
    InternLM3ForCausalLM,
    InternLM3Model,
    InternLM3Tokenizer,
    InternLMConfig,
    InternLMForCausalLM,
    InternLMModel,
    InternLMTokenizer,
)
from hanlin.hf.register import register  # noqa: E402
from hanlin.hf.visualglm import (  # noqa: E402
    VISUALGLM,
    ChatGLMForConditionalGenerationWithImage,
    VisualGLMConfig,
)

__all__ = [
    "ChatGLM4Tokenizer",
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMForConditionalGenerationWithImage",
    "ChatGLMModel",
    "ChatGLMTokenizer",
    "InternLM2Config",
    "InternLM2ForCausalLM",
    "InternLM2ForRewardModel",
    "InternLM2ForSequenceClassification",
    "InternLM2Model",
    "InternLM2Tokenizer",
    "InternLM2TokenizerFast",
    "InternLM3Config",
    "InternLM3ForCausalLM",
    "InternLM3Model",
    "InternLM3Tokenizer",
    "InternLMConfig",
    "InternLMForCausalLM",
    "InternLMModel",
    "InternLMTokenizer",
    "VisualGLMConfig",
    "load_model_on_gpus",
]

register(FAMILY, CHATGLM, VISUALGLM, CHATGLM2, INTERNLM, INTERNLM3)
