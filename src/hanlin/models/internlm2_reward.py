"""InternLM2-Reward: the body of InternLM2 and one value at the token that ends a conversation.

Source: the released model files and model card; Cai et al. 2024 (arXiv 2403.17297), section 4.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from hanlin.layers.attend import Attend
from hanlin.layers.linear import Linear
from hanlin.layers.rope import Positions
from hanlin.models.config import DecoderConfig
from hanlin.models.internlm2 import Block, InternLM2Model, read_config
from hanlin.models.parts import ModelParts

__all__ = ["InternLM2ForRewardModel", "read_config"]


class InternLM2ForRewardModel(nn.Module):
    """model(ids, positions, attend) -> hidden (T, D); head(hidden rows) -> values (rows, 1) float32.

    A conversation's score is the value at its last token, `config.reward_id`.
    """

    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = InternLM2Model(config)
        self.v_head = Linear(config.hidden_size, 1)

    def forward(self, ids: Tensor, positions: Positions, attend: Attend) -> Tensor:
        return self.model(ids, positions, attend)  # type: ignore[no-any-return]

    def head(self, rows: Tensor) -> Tensor:
        return self.v_head(rows).float()  # type: ignore[no-any-return]

    def parts(self) -> ModelParts:
        model = self.model
        return ModelParts(
            embedding=model.tok_embeddings,
            blocks=tuple(cast(Block, layer).parts() for layer in model.layers),
            norm=model.norm,
            head=self.v_head,
            tied=False,
        )
